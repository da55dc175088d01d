// What the network held after each character of a text, read from the service as the text grows.

import { pause } from "./api.js";
import { bitsOf } from "./numbers.js";

const BATCH = 256; // characters asked for at a time
const DETAILED = 48; // with gates and distributions, if they are so few
const WINDOW = 16; // the same around a place that is looked at
const SPACING = 256; // characters between two states that reading can go on from
const NUM_KEPT = 512; // details, and distributions
const STATES_BYTES = 64 * 1024 * 1024;
const REST_MS = 30; // between two calls, in which characters gather
const NUM_LIKELIEST = 20;

/**
 * Reads along with a branch. Indices count its `chars`. Dispatches `seen` when there is more to see, `note`.
 * states[i]: Uint16Array (L * H), float16 bits of the state after character i. surprises[i]: nats.
 */
export class Watch extends EventTarget {
  states = [];
  surprises = [];
  #api;
  #branch;
  #portable = new Map(); // number of characters read -> portable state
  #details = new Map(); // index -> {reset, update, candidate, embedding}: bits
  #next = new Map(); // number of characters read -> [[char, probability]], the likeliest first
  #zero = null; // the state before the first character
  #wanted = null; // an index that is looked at
  #isReading = false;
  #hasFailed = false; // until the text changes
  #changes = 0;

  constructor(api, branch) {
    super();
    this.#api = api;
    this.#branch = branch;
    branch.addEventListener("text", (event) => this.#cut(event.detail));
    this.#read();
  }

  /** How many characters have been read. */
  get known() {
    return this.states.length;
  }

  /** Forget what came of characters that are no longer there; all of it, if the model is another. */
  #cut(length) {
    this.#hasFailed = false;
    if (length < this.known) {
      this.#changes++;
      this.states.length = this.surprises.length = length;
      const isCut = (map, end) => [...map.keys()].filter((key) => key > end).forEach((key) => map.delete(key));
      isCut(this.#portable, length);
      isCut(this.#next, length);
      isCut(this.#details, length - 1);
      if (length === 0) this.#portable.clear();
    }
    this.#read();
  }

  /** {before, after, details, next} of a character, each null as long as it is not known; it is then asked for. */
  look(index) {
    const after = this.states[index] ?? null;
    const before = (index > 0 ? this.states[index - 1] : this.#zero) ?? null;
    const [details, next] = [this.#details.get(index) ?? null, this.#next.get(index + 1) ?? null];
    if (index < this.known && !(after && before && details && next)) {
      this.#wanted = index;
      this.#read();
    }
    return { before, after, details, next };
  }

  async #read() {
    if (this.#isReading || this.#hasFailed) return;
    this.#isReading = true;
    try {
      for (;;) {
        const [wanted, waiting] = [this.#wanted, this.#branch.chars.length - this.known];
        this.#wanted = null;
        if (wanted !== null && wanted < this.known) {
          await this.#ask(wanted, Math.min(wanted + WINDOW, this.known), true);
        } else if (waiting > 0) {
          // The end of what waits is looked at: it comes with details.
          const count = Math.min(waiting > DETAILED ? waiting - WINDOW : waiting, BATCH);
          await this.#ask(this.known, this.known + count, count <= DETAILED);
          await pause(REST_MS);
        } else {
          return;
        }
      }
    } catch (error) {
      this.#hasFailed = true;
      this.dispatchEvent(new CustomEvent("note", { detail: error.message }));
    } finally {
      this.#isReading = false;
    }
  }

  async #ask(from, to, isDetailed) {
    const changes = this.#changes;
    const { chars, first, model } = this.#branch;
    const start = Math.max(0, ...[...this.#portable.keys()].filter((place) => place <= from));
    const asked = chars.slice(start, to);
    const count = model.charset.countRead(asked);
    if (start + count <= from) return this.#step(start, count, changes);
    const isNew = from === this.known;
    const body = {
      text: asked.slice(0, count).join(""), from: first + from, portable: isNew,
      gates: isDetailed, embedding: isDetailed, logprobs: isDetailed ? NUM_LIKELIEST : 0,
    };
    const answer = await this.#api.call("POST", "v1/inspect", { ...body, ...(await this.#begin(start)) });
    if (changes === this.#changes) this.#keep(from, answer, isDetailed, isNew);
  }

  /** Where reading begins: a portable state, or a model. */
  async #begin(start) {
    const { first, path, model } = this.#branch;
    if (start === 0 && first === 0) return { model: model.id };
    if (!this.#portable.has(start)) {
      const body = { session: this.#branch.id, from: first, to: first, portable: true };
      this.#portable.set(0, (await this.#api.call("POST", "v1/inspect", body)).state);
    }
    return { state: this.#portable.get(start) };
  }

  /** Read up to a place that reading can go on from. */
  async #step(start, count, changes) {
    const text = this.#branch.chars.slice(start, start + count).join("");
    const body = { text, from: this.#branch.first + start + count, portable: true, ...(await this.#begin(start)) };
    const { state } = await this.#api.call("POST", "v1/inspect", body);
    if (changes === this.#changes) this.#portable.set(start + count, state);
  }

  #keep(from, answer, isDetailed, isNew) {
    const chars = Array.from(answer.text);
    const size = answer.states.shape[1] * answer.states.shape[2];
    const states = bitsOf(answer.states);
    const count = chars.length;
    if (from === 0) this.#zero = bitsOf(answer.before);
    for (let i = 0; i < count; i++) {
      this.states[from + i] = states.subarray(i * size, (i + 1) * size);
      this.surprises[from + i] = -answer.logprobs.token_logprobs[i];
    }
    if (isDetailed) this.#keepDetails(from, answer, count);
    if (isNew) {
      this.#mark(from + count, answer.state);
      this.#forget(size);
    }
    this.dispatchEvent(new Event("seen"));
  }

  /** Of two places to go on from that are close to each other the later one is enough, as long as it is the last. */
  #mark(place, state) {
    const [last, one] = [...this.#portable.keys()].sort((a, b) => b - a);
    if (one !== undefined && place - one <= SPACING) this.#portable.delete(last);
    this.#portable.set(place, state);
  }

  #keepDetails(from, { gates, embedding, logprobs, next, states }, count) {
    const size = states.shape[1] * states.shape[2];
    const parts = Object.entries({ ...gates, embedding }).map(([name, numbers]) => {
      return { name, bits: bitsOf(numbers), size: name === "embedding" ? numbers.shape[1] : size };
    });
    for (let i = 0; i < count; i++) {
      const of = parts.map(({ name, bits, size }) => [name, bits.subarray(i * size, (i + 1) * size)]);
      this.#details.set(from + i, Object.fromEntries(of));
      this.#next.set(from + i, sorted(Object.entries(logprobs.top_logprobs[i])));
    }
    this.#next.set(from + count, sorted(next.map(({ char, logprob }) => [char, logprob])));
    for (const map of [this.#details, this.#next]) {
      for (const key of map.keys()) {
        if (map.size <= NUM_KEPT) break;
        map.delete(key);
      }
    }
  }

  /** States of long ago, if there are too many. */
  #forget(size) {
    const allowed = Math.floor(STATES_BYTES / (2 * size));
    for (let i = this.known - allowed - 1; i >= 0 && this.states[i]; i--) this.states[i] = undefined;
  }
}

const sorted = (pairs) => pairs.map(([char, logprob]) => [char, Math.exp(logprob)]).sort((a, b) => b[1] - a[1]);
