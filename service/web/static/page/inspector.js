// Reads what the network computed at each character of a branch, through POST /v1/inspect, while the text grows.

import { pause } from "./api.js";
import { float16Bits } from "./numbers.js";

const MAX_BATCH = 256; // characters in one request
const MAX_DETAILED_BATCH = 48; // characters in one request that also returns gates and probabilities
const WINDOW = 16; // characters whose details are read together, from the one under the cursor on
const CHECKPOINT_SPACING = 256; // characters between two checkpoints
const MAX_DETAILS = 512; // characters whose details and probabilities are cached
const STATES_BYTES = 64 * 1024 * 1024;
const GATHER_MS = 30; // pause between two requests, in which characters gather
const NUM_PROBABILITIES = 20;

/**
 * Follows a branch; indices are those of its `chars`. Dispatches `read` when more is known, and `message`.
 * states[i]: Uint16Array (L * H), float16 bits of the hidden state after character i; undefined for old characters if
 * memory is short. surprises[i]: -log of the probability of character i, in nats.
 */
export class Inspector extends EventTarget {
  states = [];
  surprises = [];
  #api;
  #branch;
  #checkpoints = new Map(); // number of characters read -> portable state, from which reading can continue
  #details = new Map(); // index -> {reset, update, candidate, embedding}: float16 bits
  #next = new Map(); // number of characters read -> [[char, probability]] of the next character, most likely first
  #initial = null; // float16 bits of the state before the first character
  #requestedIndex = null; // index whose details the page wants to show
  #isReading = false;
  #hasFailed = false; // after an error nothing is read until the text changes
  #readingTo = 0; // index after the last character of the request that is under way
  #numTruncations = 0; // tells whether the text was truncated while a request was under way

  constructor(api, branch) {
    super();
    this.#api = api;
    this.#branch = branch;
    branch.addEventListener("text", (event) => this.#onTextChange(event.detail));
    this.#read();
  }

  /** Number of characters whose states are known. */
  get numRead() {
    return this.states.length;
  }

  /** Drop what was read of characters that were removed or replaced. A rebase to another model replaces them all. */
  #onTextChange(from) {
    this.#hasFailed = false;
    if (from < Math.max(this.numRead, this.#readingTo)) this.#numTruncations++;
    if (from < this.numRead) {
      this.states.length = this.surprises.length = from;
      const deleteAfter = (map, last) => [...map.keys()].filter((key) => key > last).forEach((key) => map.delete(key));
      deleteAfter(this.#checkpoints, from);
      deleteAfter(this.#next, from);
      deleteAfter(this.#details, from - 1);
    }
    if (from === 0) {
      this.#checkpoints.clear();
      this.#next.clear();
      this.#initial = null;
    }
    this.#read();
  }

  /** Return {before, after, details, next} of a character. Parts that are not known yet are null and get requested. */
  get(index) {
    const after = this.states[index] ?? null;
    const before = (index > 0 ? this.states[index - 1] : this.#initial) ?? null;
    const [details, next] = [this.#details.get(index) ?? null, this.#next.get(index + 1) ?? null];
    if (index < this.numRead && !(after && before && details && next)) {
      this.#requestedIndex = index;
      this.#read();
    }
    return { before, after, details, next };
  }

  async #read() {
    if (this.#isReading || this.#hasFailed) return;
    this.#isReading = true;
    try {
      for (;;) {
        const [requested, numUnread] = [this.#requestedIndex, this.#branch.chars.length - this.numRead];
        this.#requestedIndex = null;
        if (requested !== null && requested < this.numRead) {
          await this.#inspect(requested, Math.min(requested + WINDOW, this.numRead), true);
        } else if (numUnread > 0) {
          // The page shows the last character, so the end of the text is read with details.
          const count = Math.min(numUnread > MAX_DETAILED_BATCH ? numUnread - WINDOW : numUnread, MAX_BATCH);
          await this.#inspect(this.numRead, this.numRead + count, count <= MAX_DETAILED_BATCH);
          await pause(GATHER_MS);
        } else {
          return;
        }
      }
    } catch (error) {
      this.#hasFailed = true;
      this.dispatchEvent(new CustomEvent("message", { detail: error.message }));
    } finally {
      this.#isReading = false;
    }
  }

  /** Read the characters [from, to), starting at the last checkpoint before them. */
  async #inspect(from, to, isDetailed) {
    const numTruncations = this.#numTruncations;
    const { chars, start, model } = this.#branch;
    const checkpoint = Math.max(0, ...[...this.#checkpoints.keys()].filter((place) => place <= from));
    const batch = chars.slice(checkpoint, to);
    const count = model.charset.countSendable(batch);
    this.#readingTo = checkpoint + count;
    if (checkpoint + count <= from) return this.#addCheckpoint(checkpoint, count, numTruncations);
    const isNew = from === this.numRead;
    const body = {
      text: batch.slice(0, count).join(""), from: start + from, portable: isNew,
      gates: isDetailed, embedding: isDetailed, logprobs: isDetailed ? NUM_PROBABILITIES : 0,
    };
    const answer = await this.#api.call("POST", "v1/inspect", { ...body, ...(await this.#origin(checkpoint)) });
    if (numTruncations === this.#numTruncations) this.#store(from, answer, isDetailed, isNew);
  }

  /** The fields of a request that say where it starts: at a portable state, or at the model's initial state. */
  async #origin(checkpoint) {
    const { start, model } = this.#branch;
    if (checkpoint === 0 && start === 0) return { model: model.id };
    if (!this.#checkpoints.has(checkpoint)) {
      const body = { session: this.#branch.id, from: start, to: start, portable: true };
      this.#checkpoints.set(0, (await this.#api.call("POST", "v1/inspect", body)).state);
    }
    return { state: this.#checkpoints.get(checkpoint) };
  }

  /** Read up to a place where a request must end, and keep the state there as a checkpoint. */
  async #addCheckpoint(checkpoint, count, numTruncations) {
    const text = this.#branch.chars.slice(checkpoint, checkpoint + count).join("");
    const body = { text, from: this.#branch.start + checkpoint + count, portable: true, ...(await this.#origin(checkpoint)) };
    const { state } = await this.#api.call("POST", "v1/inspect", body);
    if (numTruncations === this.#numTruncations) this.#checkpoints.set(checkpoint + count, state);
  }

  #store(from, answer, isDetailed, isNew) {
    const chars = Array.from(answer.text);
    const size = answer.states.shape[1] * answer.states.shape[2];
    const states = float16Bits(answer.states);
    const count = chars.length;
    if (from === 0) this.#initial = float16Bits(answer.before);
    for (let i = 0; i < count; i++) {
      this.states[from + i] = states.subarray(i * size, (i + 1) * size);
      this.surprises[from + i] = -answer.logprobs.token_logprobs[i];
    }
    if (isDetailed) this.#storeDetails(from, answer, count);
    if (isNew) {
      this.#storeCheckpoint(from + count, answer.state);
      this.#evictStates(size);
    }
    this.dispatchEvent(new Event("read"));
  }

  /** Store the newest checkpoint. It replaces the last one if that is close to the checkpoint before it. */
  #storeCheckpoint(place, state) {
    const [last, lastButOne] = [...this.#checkpoints.keys()].sort((a, b) => b - a);
    if (lastButOne !== undefined && place - lastButOne <= CHECKPOINT_SPACING) this.#checkpoints.delete(last);
    this.#checkpoints.set(place, state);
  }

  #storeDetails(from, { gates, embedding, logprobs, next, states }, count) {
    const stateSize = states.shape[1] * states.shape[2];
    const arrays = Object.entries({ ...gates, embedding }).map(([name, array]) => {
      return { name, bits: float16Bits(array), size: name === "embedding" ? array.shape[1] : stateSize };
    });
    for (let i = 0; i < count; i++) {
      const entries = arrays.map(({ name, bits, size }) => [name, bits.subarray(i * size, (i + 1) * size)]);
      this.#details.set(from + i, Object.fromEntries(entries));
      this.#next.set(from + i, byProbability(Object.entries(logprobs.top_logprobs[i])));
    }
    this.#next.set(from + count, byProbability(next.map(({ char, logprob }) => [char, logprob])));
    for (const map of [this.#details, this.#next]) {
      for (const key of map.keys()) {
        if (map.size <= MAX_DETAILS) break;
        map.delete(key);
      }
    }
  }

  /** Drop the oldest states above the memory limit. */
  #evictStates(size) {
    const allowed = Math.floor(STATES_BYTES / (2 * size));
    for (let i = this.numRead - allowed - 1; i >= 0 && this.states[i]; i--) this.states[i] = undefined;
  }
}

const byProbability = (pairs) => pairs.map(([char, logprob]) => [char, Math.exp(logprob)]).sort((a, b) => b[1] - a[1]);
