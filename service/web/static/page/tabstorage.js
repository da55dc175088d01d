// Stores in the tab's sessionStorage what a reload of the page needs. The browser deletes it when the tab is closed.

const KEY = "gru-serve.texts";
const WRITE_DELAY_MS = 300;

/** Writes what `snapshot()` returns: a short time after a change, and before the page is left. */
export class TabStorage {
  #snapshot;
  #timer = null;

  constructor(snapshot) {
    this.#snapshot = snapshot;
    addEventListener("pagehide", () => this.#write());
  }

  scheduleWrite() {
    this.#timer ??= setTimeout(() => this.#write(), WRITE_DELAY_MS);
  }

  #write() {
    clearTimeout(this.#timer);
    this.#timer = null;
    try {
      sessionStorage.setItem(KEY, JSON.stringify(this.#snapshot()));
    } catch {
      // The storage is full. A reload starts from the last snapshot that fitted; the server has the rest.
    }
  }

  /** Return what was stored, or null if there is nothing usable. */
  static read() {
    try {
      return JSON.parse(sessionStorage.getItem(KEY));
    } catch {
      return null;
    }
  }
}
