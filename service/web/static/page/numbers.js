// float16 into numbers, and numbers into colours.

const TABLE = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  TABLE[bits] =
    exponent === 0 ? sign * fraction * 2 ** -24
    : exponent === 31 ? (fraction ? NaN : sign * Infinity)
    : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The number that float16 bits stand for. */
export const float = (bits) => TABLE[bits];

/** base64 of little-endian float16 -> its bits. */
export function bitsOf({ data }) {
  const bytes = Uint8Array.fromBase64?.(data) ?? Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

/** A number as the page shows it. */
export const digits = (value, places = 2) => value.toFixed(places).replace("-", "−");

const SCALE = 256;

/** 257 colours, RGBA as one number each: from the style sheet's --cold at -1 over --zero to --warm at 1. */
export function readScale() {
  const style = getComputedStyle(document.documentElement);
  const [cold, zero, warm] = ["--cold", "--zero", "--warm"].map((name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  });
  return Uint32Array.from({ length: SCALE + 1 }, (_, step) => {
    const value = (2 * step) / SCALE - 1;
    const end = value < 0 ? cold : warm;
    const [r, g, b] = zero.map((from, i) => Math.round(from + Math.abs(value) * (end[i] - from)));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
}

/** Cells in a row of a grid of so many. */
export const columnsOf = (count) => Math.ceil(Math.sqrt(count));

/**
 * Paint float16 bits as cells, one pixel each; style sheets make them larger. largest: the number that gets the last
 * colour. bits null: nothing is known.
 */
export function paintCells(canvas, bits, columns, scale, largest = 1) {
  const count = bits?.length ?? 0;
  const rows = Math.max(1, Math.ceil(count / columns));
  if (canvas.width !== columns || canvas.height !== rows) [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < count; i++) {
    const value = Math.max(-1, Math.min(1, TABLE[bits[i]] / largest));
    pixels[i] = scale[Math.round(((value + 1) / 2) * SCALE)];
  }
  context.putImageData(image, 0, 0);
}
