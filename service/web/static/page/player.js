// Going through the text by itself, so many characters a second.

/** step: () -> whether there was another character. Dispatches `playing` when it begins or ends. */
export class Player extends EventTarget {
  speed = 8;
  #step;
  #frame = null;

  constructor(step) {
    super();
    this.#step = step;
  }

  get isPlaying() {
    return this.#frame !== null;
  }

  play() {
    if (this.isPlaying) return;
    let last = performance.now();
    let due = 0;
    const next = (now) => {
      due += ((now - last) / 1000) * this.speed;
      last = now;
      for (; due >= 1; due--) if (!this.#step()) return this.pause();
      this.#frame = requestAnimationFrame(next);
    };
    this.#frame = requestAnimationFrame(next);
    this.dispatchEvent(new Event("playing"));
  }

  pause() {
    if (!this.isPlaying) return;
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.dispatchEvent(new Event("playing"));
  }
}
