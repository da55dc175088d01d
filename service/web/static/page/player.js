// Steps through a text automatically, at a chosen speed.

/** step(): moves to the next character and returns whether there was one. Dispatches `change` on play and pause. */
export class Player extends EventTarget {
  speed = 8; // characters per second
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
    this.dispatchEvent(new Event("change"));
  }

  pause() {
    if (!this.isPlaying) return;
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.dispatchEvent(new Event("change"));
  }
}
