// The characters that a model knows, and how the page names a character. Positions count code points, as in the service.

/** The charset of a model. */
export class Charset {
  #indices;

  constructor(characters) {
    this.#indices = new Map(Array.from(characters, (char, index) => [char, index]));
  }

  get size() {
    return this.#indices.size;
  }

  has(char) {
    return this.#indices.has(char);
  }

  /** The index of a character, which is also its row in the embedding table. */
  index(char) {
    return this.#indices.get(char);
  }

  /**
   * Return the code points that the service reads from a text. It composes letters with their marks (NFC); a composed
   * character that the model doesn't know is decomposed (NFD) if the model knows all its parts.
   */
  read(text) {
    return Array.from(text.normalize("NFC")).flatMap((char) => {
      if (this.has(char)) return [char];
      const parts = Array.from(char.normalize("NFD"));
      return parts.every((part) => this.has(part)) ? parts : [char];
    });
  }

  /** Return {known, rest}: the code points before the first one that the model doesn't know, and those from it on. */
  split(text) {
    const chars = this.read(text);
    const end = chars.findIndex((char) => !this.has(char));
    return end < 0 ? { known: chars, rest: [] } : { known: chars.slice(0, end), rest: chars.slice(end) };
  }

  /** Return the distinct characters of a text that the model doesn't know, in their order. */
  unknown(chars) {
    return [...new Set(chars)].filter((char) => !this.has(char));
  }

  /**
   * Return how many of these characters can be sent in one request. The service composes the text of a request, so a
   * request must end before a mark that would join with the character before it.
   */
  countSendable(chars) {
    const isUnchanged = this.read(chars.join("")).every((char, i) => char === chars[i]);
    const firstMark = isUnchanged ? -1 : chars.findIndex((char, i) => i > 0 && /[\p{M}\u1160-\u11FF]/u.test(char));
    return firstMark < 0 ? chars.length : firstMark;
  }
}

const VISIBLE = { "\n": "⏎", " ": "␣", "\t": "⇥" };

/** A visible form of a character: blanks get a symbol, combining marks a dotted circle. */
export function visible(char) {
  if (char in VISIBLE) return VISIBLE[char];
  return /\p{M}/u.test(char) ? `◌${char}` : char;
}

const MAX_NAMED = 5;

/** Names for the first of some characters, and the number of the others. */
export function describeAll(chars) {
  const names = chars.slice(0, MAX_NAMED).map(describe);
  if (chars.length > MAX_NAMED) return `${names.join(", ")} and ${chars.length - MAX_NAMED} more`;
  return names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0];
}

/** The visible form with the code point: é (U+00E9). */
export function describe(char) {
  return `${visible(char)} (U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")})`;
}
