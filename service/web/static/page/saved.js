// What a reload needs to go on: kept for the tab, until it is closed.

const PLACE = "gru-serve.texts";
const REST_MS = 300;

/** Saves what `current` answers: some time after changes, and before the page goes. */
export class Saved {
  #current;
  #timer = null;

  constructor(current) {
    this.#current = current;
    addEventListener("pagehide", () => this.#write());
  }

  changed() {
    this.#timer ??= setTimeout(() => this.#write(), REST_MS);
  }

  #write() {
    clearTimeout(this.#timer);
    this.#timer = null;
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(this.#current()));
    } catch {
      // No room: a reload finds the last that had some, and the rest on the server.
    }
  }

  /** What was saved; null: nothing usable. */
  static read() {
    try {
      return JSON.parse(sessionStorage.getItem(PLACE));
    } catch {
      return null;
    }
  }
}
