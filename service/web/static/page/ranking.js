// Which units go most with what: correlations over a text, computed in pieces so that the page goes on answering.

import { float } from "./numbers.js";

const MAX_CHARS = 4096; // the last ones
const PIECE_MS = 6;
const NUM_UNITS = 3;

const isLetter = (char) => /\p{L}/u.test(char);
const isVowel = (char) => "aeiouyAEIOUY".includes(char.normalize("NFD")[0]);

/** What a text may have after each character: (chars, i, the number at i - 1) -> a number. */
const FEATURES = {
  "how far the line has come": (chars, i, last) => (chars[i] === "\n" ? 0 : last + 1),
  "the beginning of a line": (chars, i) => Number(chars[i] === "\n"),
  "the name of who speaks": (chars, i, last) => {
    if (i === 0) return Number(isLetter(chars[0]));
    if (chars[i] === "\n") return Number(chars[i - 1] === "\n");
    return chars[i - 1] === ":" ? 0 : last;
  },
  "how long the word is so far": (chars, i, last) => (isLetter(chars[i]) ? last + 1 : 0),
  "the end of a word": (chars, i) => Number(i > 0 && !isLetter(chars[i]) && isLetter(chars[i - 1])),
  "the end of a sentence": (chars, i) => Number(".!?".includes(chars[i])),
  "a capital letter": (chars, i) => Number(/\p{Lu}/u.test(chars[i])),
  "a vowel": (chars, i) => Number(isVowel(chars[i])),
};

/**
 * [[name, [[unit, correlation], ...]], ...]: the units of a layer that follow each feature most closely.
 * states[i]: float16 bits of all layers after character i. signal: gives up. Throws its reason.
 */
export async function ranked(chars, states, units, layer, signal) {
  const [end, names] = [Math.min(chars.length, states.length), Object.keys(FEATURES)];
  const values = names.map(() => 0);
  const sums = { unit: new Float64Array(units), square: new Float64Array(units) };
  const products = names.map(() => new Float64Array(units));
  const [featureSums, featureSquares] = [names.map(() => 0), names.map(() => 0)];
  let count = 0;
  let started = performance.now();
  for (let i = 0; i < end; i++) {
    names.forEach((name, f) => (values[f] = FEATURES[name](chars, i, values[f])));
    if (i < end - MAX_CHARS || !states[i]) continue;
    count++;
    values.forEach((value, f) => {
      featureSums[f] += value;
      featureSquares[f] += value * value;
    });
    const present = values.flatMap((value, f) => (value ? [[value, products[f]]] : []));
    for (let unit = 0, at = layer * units; unit < units; unit++, at++) {
      const number = float(states[i][at]);
      sums.unit[unit] += number;
      sums.square[unit] += number * number;
      for (const [value, product] of present) product[unit] += value * number;
    }
    if (performance.now() - started < PIECE_MS) continue;
    await new Promise((resolve) => setTimeout(resolve));
    signal.throwIfAborted();
    started = performance.now();
  }
  return names.flatMap((name, f) => {
    const spread = featureSquares[f] - featureSums[f] ** 2 / count;
    if (count < 2 || spread < 1e-9) return [];
    const all = Array.from(products[f], (product, unit) => {
      const ownSpread = sums.square[unit] - sums.unit[unit] ** 2 / count;
      return ownSpread < 1e-6 ? 0 : (product - (featureSums[f] * sums.unit[unit]) / count) / Math.sqrt(spread * ownSpread);
    });
    const best = all.map((r, unit) => [unit, r]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    return [[name, best.slice(0, NUM_UNITS)]];
  });
}
