// What of a text a model knows. Positions count code points, as the service does.

/** The characters of a model. */
export class Charset {
  #numbers;

  constructor(characters) {
    this.#numbers = new Map(Array.from(characters, (char, number) => [char, number]));
  }

  get size() {
    return this.#numbers.size;
  }

  has(char) {
    return this.#numbers.has(char);
  }

  /** The row of the embedding that is a character's. */
  number(char) {
    return this.#numbers.get(char);
  }

  /** The code points of a text as the service reads them: composed, or taken apart where only the parts are known. */
  read(text) {
    return Array.from(text.normalize("NFC")).flatMap((char) => {
      if (this.has(char)) return [char];
      const parts = Array.from(char.normalize("NFD"));
      return parts.every((part) => this.has(part)) ? parts : [char];
    });
  }

  /** {known, rest}: the code points up to the first one that is not known, and what follows. */
  split(text) {
    const chars = this.read(text);
    const end = chars.findIndex((char) => !this.has(char));
    return end < 0 ? { known: chars, rest: [] } : { known: chars.slice(0, end), rest: chars.slice(end) };
  }

  /** How many of these characters the service reads as just these, if it gets them alone: it composes what it gets. */
  countRead(chars) {
    const isSame = this.read(chars.join("")).every((char, i) => char === chars[i]);
    const joins = isSame ? -1 : chars.findIndex((char, i) => i > 0 && /[\p{M}\u1160-\u11FF]/u.test(char));
    return joins < 0 ? chars.length : joins;
  }
}

const SHOWN = { "\n": "⏎", " ": "␣", "\t": "⇥" };

/** A character by itself, so that it can be seen. */
export function shown(char) {
  if (char in SHOWN) return SHOWN[char];
  return /\p{M}/u.test(char) ? `◌${char}` : char;
}

/** The same with its number: é (U+00E9). */
export function named(char) {
  return `${shown(char)} (U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")})`;
}
