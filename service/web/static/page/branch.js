// One text: a session on the server, and what of it the server doesn't have yet.

import { ApiError, pause } from "./api.js";

const GOES_ON = new Set(["engine_failed", "not_ready", "draining", "overloaded"]); // in a stream: take it up again
const GONE = new Set([404, 410]);
const BATCH_CHARS = 8192;

export const randomId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/**
 * chars: the text's code points from position `first` on, those that were typed and not sent among them. sent: up to
 * which position the server has them. Dispatches `text` (detail: first index that changed), `run`, `sent`, `note`.
 */
export class Branch extends EventTarget {
  chars = [];
  past = ""; // text before `first`, known from a file
  settle = null; // a position that the server's text is to be taken back to
  #api;
  #flying = 0; // up to here it is on its way
  #working = null;
  #run = null;

  /** model: {id, charset}. facts: the service's of its session. */
  constructor(api, model, name, facts) {
    super();
    this.#api = api;
    this.model = model;
    this.name = name;
    this.#take(facts);
  }

  /** A new session. fields: of the API's call. */
  static async create(api, models, name, fields = {}) {
    const facts = await api.call("PUT", `v1/sessions/${randomId()}`, fields);
    return new Branch(api, await models.get(facts.model), name, facts);
  }

  #take(facts) {
    this.id = facts.id;
    this.seed = facts.seed;
    this.first = facts.text_from;
    this.sent = facts.position;
  }

  get end() {
    return this.first + this.chars.length;
  }

  get path() {
    return `v1/sessions/${this.id}`;
  }

  get isRunning() {
    return this.#run !== null;
  }

  get #isBehind() {
    return this.settle !== null || (this.end > this.sent && !this.isRunning);
  }

  /** What a reload needs to go on. */
  get saved() {
    const { id, name, past, first, seed, sent, settle, isRunning } = this;
    return { id, name, past, first, seed, sent, settle, isRunning, model: this.model.id, text: this.chars.join("") };
  }

  /** The text of before a reload: what the server doesn't have is given to it, and a stream is taken up. */
  static async restore(api, model, saved) {
    const facts = { id: saved.id, seed: saved.seed, text_from: saved.first, position: saved.sent };
    const branch = new Branch(api, model, saved.name, facts);
    branch.past = saved.past;
    branch.settle = saved.settle;
    branch.chars = Array.from(saved.text);
    await branch.work();
    if (saved.isRunning) branch.#start("GET");
    return branch;
  }

  /** Take over the server's text. */
  async #fetch() {
    this.#take(await this.#api.call("GET", this.path));
    const answer = await this.#api.call("GET", `${this.path}/text`);
    this.first = answer.from;
    this.chars = Array.from(answer.text);
    this.sent = answer.to;
    this.settle = null;
    this.#changed(0);
  }

  /** Add what was typed; it may join with what waits. All of it has to be known to the model. */
  append(text) {
    this.stop();
    const firm = Math.max(this.settle ?? Math.max(this.sent, this.#flying), this.first) - this.first;
    const before = this.chars.slice(firm);
    const chars = this.model.charset.read(before.join("") + text);
    this.chars.length = firm;
    for (const char of chars) this.chars.push(char);
    const isSame = before.every((char, i) => char === chars[i]);
    this.#changed(isSame ? firm + before.length : firm);
    this.work();
  }

  /** Only what lies before a position is left. */
  rewind(position) {
    this.stop();
    if (position >= this.end) return;
    this.chars.length = position - this.first;
    if (position < Math.max(this.sent, this.#flying)) this.settle = Math.min(position, this.settle ?? position);
    this.#changed(this.chars.length);
    this.work();
  }

  /** A new session with the same text up to a position. */
  async fork(position, name) {
    this.stop();
    await this.work();
    const facts = await this.#api.call("POST", `${this.path}/fork`, { id: randomId(), position });
    const other = new Branch(this.#api, this.model, name, facts);
    other.past = this.past;
    other.first = this.first;
    other.chars = this.chars.slice(0, position - this.first);
    return other;
  }

  /** Read the text into another model. Throws ApiError: nothing is changed. */
  async rebase(model) {
    this.stop();
    await this.work();
    const body = { text: "", position: this.sent, rebase: model.id, num_next: 0 };
    await this.#api.call("POST", `${this.path}/feed`, body);
    this.model = model;
    await this.#fetch();
  }

  /** {state, position, model, seed}: a portable one. */
  async state() {
    this.stop();
    await this.work();
    return this.#api.call("GET", `${this.path}/state`);
  }

  async forget() {
    this.stop();
    await this.#working;
    await this.#api.call("DELETE", this.path);
  }

  /** Bring the server to where the text is; resolves when it is there. Only one such work goes on at a time. */
  work() {
    if (!this.#isBehind && !this.#working) return Promise.resolve();
    this.#working ??= this.#bring().then((isDone) => {
      this.#working = null;
      if (isDone) return this.work(); // with what has come in since
    });
    return this.#working;
  }

  async #bring() {
    try {
      while (this.#isBehind) await (this.settle === null ? this.#feed() : this.#takeBack());
      return true;
    } catch (error) {
      return await this.#recover(error);
    } finally {
      this.#flying = 0;
      this.dispatchEvent(new Event("sent"));
    }
  }

  async #takeBack() {
    const position = this.settle;
    await this.#api.call("POST", `${this.path}/rewind`, { position });
    this.sent = position;
    if (this.settle === position) this.settle = null;
  }

  async #feed() {
    const start = this.sent - this.first;
    const batch = this.chars.slice(start, start + BATCH_CHARS);
    this.#flying = this.sent + batch.length;
    const body = { text: batch.join(""), position: this.sent, num_next: 0 };
    const { position } = await this.#api.call("POST", `${this.path}/feed`, body);
    if (position !== this.#flying) throw new Error("The server counts this text's characters otherwise.");
    this.sent = position;
  }

  /** Whether there is a session again, which only lacks text; else the text is what the server has, if it has one. */
  async #recover(error) {
    try {
      if (!GONE.has(error.status) || this.first > 0) {
        this.#note(error.message);
        await this.#fetch();
        return false;
      }
      const body = { model: this.model.id, seed: this.seed };
      this.#take(await this.#api.call("PUT", `v1/sessions/${randomId()}`, body));
      this.settle = null;
      this.#note("The server had forgotten this text, and reads it again.");
      return true;
    } catch (again) {
      this.#note(again.message);
      return false;
    }
  }

  /** Let it go on. settings: fields of the API's generate. */
  async generate(settings) {
    await this.work();
    if (!this.isRunning) this.#start("POST", { ...settings, stream: true, position: this.sent });
  }

  /** The text stands where it is shown; what the server may have generated beyond is taken back. */
  stop() {
    if (!this.isRunning) return;
    this.#run.abort();
    this.#run = null;
    this.settle = Math.min(this.sent, this.settle ?? this.sent);
    this.dispatchEvent(new Event("run"));
    this.work();
  }

  async #start(method, body) {
    const run = (this.#run = new AbortController());
    this.dispatchEvent(new Event("run"));
    try {
      let events = this.#api.events(method, `${this.path}/generate`, body, this.#after(method), run.signal);
      while (!(await this.#follow(events, run))) {
        await pause(50, run.signal);
        events = this.#api.events("GET", `${this.path}/generate`, undefined, this.#after("GET"), run.signal);
      }
    } catch (error) {
      if (run.signal.aborted) return; // who stopped it has seen to the rest
      await this.#recover(error);
    }
    if (this.#run === run) this.#run = null;
    this.dispatchEvent(new Event("run"));
    this.work();
  }

  #after(method) {
    return method === "GET" ? { "Last-Event-ID": String(this.sent) } : {};
  }

  /** Take in the events of a stream; whether it came to its end. */
  async #follow(events, run) {
    for await (const { id, kind, data } of events) {
      run.signal.throwIfAborted();
      if (kind === "done") return true;
      if (kind === "error" && !GOES_ON.has(data.error.code)) throw new ApiError(200, data.error);
      if (kind !== "text") return false;
      const chars = Array.from(data.text);
      const fresh = chars.slice(Math.max(0, chars.length - (id - this.sent)));
      for (const char of fresh) this.chars.push(char);
      this.sent = id;
      if (fresh.length) this.#changed(this.chars.length - fresh.length);
    }
    run.signal.throwIfAborted();
    return false;
  }

  #changed(from) {
    this.dispatchEvent(new CustomEvent("text", { detail: from }));
  }

  #note(message) {
    this.dispatchEvent(new CustomEvent("note", { detail: message }));
  }
}
