// Stores in the tab's sessionStorage what a reload of the page needs. The browser deletes it when the tab is closed. Where the
// browser blocks the storage, every access throws: the page works, and a reload begins anew.

const KEY = "gru-serve.texts";
const WRITE_DELAY_MS = 300;

/** Return the stored string of this name, or null if there is none or the storage is blocked. */
export function readItem(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Store a string. Does nothing if the storage is blocked or full. */
export function writeItem(name, value) {
  try {
    sessionStorage.setItem(name, value);
  } catch {
    // A reload starts from the last value that fitted; the server has the rest.
  }
}

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
    writeItem(KEY, JSON.stringify(this.#snapshot()));
  }

  /** Return what was stored, or null if there is nothing usable. */
  static read() {
    try {
      return JSON.parse(readItem(KEY));
    } catch {
      return null;
    }
  }
}
