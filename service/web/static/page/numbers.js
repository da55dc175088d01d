// Converts float16 bits to numbers, and numbers to colours and text.

const FLOAT16_VALUES = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  FLOAT16_VALUES[bits] =
    exponent === 0 ? sign * fraction * 2 ** -24
    : exponent === 31 ? (fraction ? NaN : sign * Infinity)
    : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The value of one float16, given as its 16 bits. */
export const float16Value = (bits) => FLOAT16_VALUES[bits];

/** Decode the base64 of little-endian float16 numbers into a Uint16Array of their bits. */
export function float16Bits({ data }) {
  const bytes = Uint8Array.fromBase64?.(data) ?? Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

/** A number as the page shows it, with a real minus sign. */
export const formatNumber = (value, places = 2) => value.toFixed(places).replace("-", "−");

const NUM_STEPS = 256;

/** 257 colours, each an RGBA pixel as one integer: the style sheet's --cold at -1, --zero at 0 and --warm at 1. */
export function readColourScale() {
  const style = getComputedStyle(document.documentElement);
  const [cold, zero, warm] = ["--cold", "--zero", "--warm"].map((name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  });
  return Uint32Array.from({ length: NUM_STEPS + 1 }, (_, step) => {
    const value = (2 * step) / NUM_STEPS - 1;
    const end = value < 0 ? cold : warm;
    const [r, g, b] = zero.map((from, i) => Math.round(from + Math.abs(value) * (end[i] - from)));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
}

/** The number of columns of a square grid with `count` cells. */
export const gridColumns = (count) => Math.ceil(Math.sqrt(count));

/**
 * Paint numbers as a grid of cells, one pixel each; the style sheet enlarges them.
 * bits: float16 bits of the numbers; null if they are not known, which clears the grid.
 * scale: of readColourScale. largest: absolute value that gets the last colour.
 */
export function paintCells(canvas, bits, columns, scale, largest = 1) {
  const count = bits?.length ?? 0;
  const rows = Math.max(1, Math.ceil(count / columns));
  if (canvas.width !== columns || canvas.height !== rows) [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < count; i++) {
    const value = Math.max(-1, Math.min(1, FLOAT16_VALUES[bits[i]] / largest));
    pixels[i] = scale[Math.round(((value + 1) / 2) * NUM_STEPS)];
  }
  context.putImageData(image, 0, 0);
}
