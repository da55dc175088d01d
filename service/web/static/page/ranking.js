// Finds the units that correlate with features of a text. It computes in slices, so that the page stays responsive.

import { float16Value } from "./numbers.js";

const MAX_CHARS = 4096; // of the text's end
const SLICE_MS = 6;
const NUM_UNITS = 3;

const isLetter = (char) => /\p{L}/u.test(char);
const SPEAKER = "inside a speaker's name";
const MAX_NAME = 30; // characters of a speaker's name
const NAME = /^\p{L}[^.,:;!?]*$/u;
const isVowel = (char) => "aeiouyAEIOUY".includes(char.normalize("NFD")[0]);

/**
 * Return for each character of a text whether it is inside the name of who speaks, as a play has it: at the start of a
 * paragraph, with a colon that ends its line, or at the start of several lines, with a colon and a blank. Null if the text
 * has fewer than two such names. Only the text's end counts, from which correlations are computed.
 */
function speakerNames(chars) {
  const lines = []; // {start, length of the name, name, whether it has the form of a play's}
  const counts = new Map(); // name -> at how many lines' starts
  const first = chars.lastIndexOf("\n", Math.max(0, chars.length - MAX_CHARS)) + 1;
  let isParagraphStart = first < 2 || chars[first - 2] === "\n";
  for (let start = first; start < chars.length; ) {
    const newline = chars.indexOf("\n", start);
    const end = newline < 0 ? chars.length : newline;
    const head = chars.slice(start, Math.min(end, start + MAX_NAME + 2));
    const length = head.indexOf(":");
    const name = head.slice(0, length).join("");
    const next = head[length + 1];
    if (length > 0 && NAME.test(name) && (next === undefined || next === " ")) {
      lines.push({ start, length, name, isHeading: isParagraphStart && next === undefined });
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    isParagraphStart = end === start;
    start = end + 1;
  }
  const names = lines.filter(({ name, isHeading }) => isHeading || counts.get(name) > 1);
  if (names.length < 2) return null;
  const isInside = new Uint8Array(chars.length);
  for (const { start, length } of names) isInside.fill(1, start, start + length);
  return isInside;
}

/** Features of a text after each character, by the name that the page shows: (chars, i, value at i - 1) -> value at i. */
const FEATURES = {
  "length of the line so far": (chars, i, last) => (chars[i] === "\n" ? 0 : last + 1),
  "start of a line": (chars, i) => Number(chars[i] === "\n"),
  [SPEAKER]: (chars, i, last, isInside) => isInside?.[i] ?? 0,
  "length of the word so far": (chars, i, last) => (isLetter(chars[i]) ? last + 1 : 0),
  "end of a word": (chars, i) => Number(i > 0 && !isLetter(chars[i]) && isLetter(chars[i - 1])),
  "end of a sentence": (chars, i) => Number(".!?".includes(chars[i])),
  "capital letter": (chars, i) => Number(/\p{Lu}/u.test(chars[i])),
  "vowel": (chars, i) => Number(isVowel(chars[i])),
};

/**
 * Return [[feature name, [[unit, correlation], ...]], ...]: for each feature the units of a layer with the largest absolute
 * Pearson correlation. Features that don't vary in this text are left out.
 * states[i]: float16 bits of all layers after character i. signal: aborts the computation, which then throws its reason.
 */
export async function rankUnits(chars, states, units, layer, signal) {
  const end = Math.min(chars.length, states.length);
  const isInsideName = speakerNames(chars);
  const names = Object.keys(FEATURES).filter((name) => name !== SPEAKER || isInsideName);
  const values = names.map(() => 0);
  const [unitSums, unitSquares] = [new Float64Array(units), new Float64Array(units)];
  const products = names.map(() => new Float64Array(units));
  const [featureSums, featureSquares] = [names.map(() => 0), names.map(() => 0)];
  let count = 0;
  let started = performance.now();
  for (let i = 0; i < end; i++) {
    names.forEach((name, f) => (values[f] = FEATURES[name](chars, i, values[f], isInsideName)));
    if (i < end - MAX_CHARS || !states[i]) continue;
    count++;
    values.forEach((value, f) => {
      featureSums[f] += value;
      featureSquares[f] += value * value;
    });
    const nonzero = values.flatMap((value, f) => (value ? [[value, products[f]]] : []));
    for (let unit = 0, at = layer * units; unit < units; unit++, at++) {
      const activation = float16Value(states[i][at]);
      unitSums[unit] += activation;
      unitSquares[unit] += activation * activation;
      for (const [value, product] of nonzero) product[unit] += value * activation;
    }
    if (performance.now() - started < SLICE_MS) continue;
    await new Promise((resolve) => setTimeout(resolve));
    signal.throwIfAborted();
    started = performance.now();
  }
  return names.flatMap((name, f) => {
    const spread = featureSquares[f] - featureSums[f] ** 2 / count;
    if (count < 2 || spread < 1e-9) return [];
    const correlations = Array.from(products[f], (product, unit) => {
      const unitSpread = unitSquares[unit] - unitSums[unit] ** 2 / count;
      return unitSpread < 1e-6 ? 0 : (product - (featureSums[f] * unitSums[unit]) / count) / Math.sqrt(spread * unitSpread);
    });
    const best = correlations.map((r, unit) => [unit, r]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    return [[name, best.slice(0, NUM_UNITS)]];
  });
}
