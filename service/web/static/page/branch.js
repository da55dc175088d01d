// One text on the page: a session on the server, plus the changes that have not reached the server yet.

import { ApiError, pause } from "./api.js";

const SESSION_LOST_CODES = new Set(["session_not_found", "session_gone"]);
export const MAX_FEED_CHARS = 8192; // of one request, if the server allows as many
const RESUME_PAUSE_MS = 50;

export const randomId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/**
 * Dispatches `text` (detail: the first index of `chars` that changed), `run` (generating started or ended), `synced` (a
 * synchronisation with the server ended) and `message` (detail: a message for the user).
 */
export class Branch extends EventTarget {
  chars = []; // code points from position `start` on, including those that the server doesn't have yet
  past = ""; // text before `start`, read from a file; it is only displayed
  runSeed = null; // the seed of the last continuation; null if there was none
  rewindTo = null; // position to which the server's text must be rewound; null if none
  #api;
  #models;
  #inFlightEnd = 0; // position after the characters of the current feed request; Infinity if that is not known
  #syncing = null; // the promise of the synchronisation that is under way
  #run = null; // the AbortController of the stream that is being read

  /** models: of the server; model: one of them. session: the service's description of the session. */
  constructor(api, models, model, name, session) {
    super();
    this.#api = api;
    this.#models = models;
    this.model = model;
    this.name = name;
    this.#adopt(session);
  }

  /** Create a session. fields: the body of the API's call. */
  static async create(api, models, name, fields = {}) {
    const session = await api.call("PUT", `v1/sessions/${randomId()}`, fields);
    return new Branch(api, models, await models.get(session.model), name, session);
  }

  #adopt(session) {
    this.id = session.id;
    this.seed = session.seed;
    this.start = session.text_from; // position of chars[0]
    this.serverEnd = session.position; // position up to which the server has the characters
  }

  get end() {
    return this.start + this.chars.length;
  }

  get path() {
    return `v1/sessions/${this.id}`;
  }

  /** The number of characters that one request may send. */
  get maxFeedChars() {
    return Math.min(MAX_FEED_CHARS, this.#models.limits.max_prompt_chars);
  }

  get isRunning() {
    return this.#run !== null;
  }

  get #isServerBehind() {
    return this.rewindTo !== null || (this.end > this.serverEnd && !this.isRunning);
  }

  /** What a reload of the page needs. The field names are a stored format: a tab may be reloaded after an upgrade. */
  get snapshot() {
    const { id, name, past, seed, runSeed, isRunning } = this;
    const positions = { first: this.start, sent: this.serverEnd, settle: this.rewindTo };
    return { id, name, past, seed, runSeed, ...positions, isRunning, model: this.model.id, text: this.chars.join("") };
  }

  /** Return the branch of a snapshot, after sending the server what it lacks. Resumes the stream that was running. */
  static async restore(api, models, snapshot) {
    const session = { id: snapshot.id, seed: snapshot.seed, text_from: snapshot.first, position: snapshot.sent };
    const branch = new Branch(api, models, await models.get(snapshot.model), snapshot.name, session);
    branch.past = snapshot.past;
    branch.runSeed = snapshot.runSeed ?? null;
    branch.rewindTo = snapshot.settle;
    branch.chars = Array.from(snapshot.text);
    if (snapshot.sending && branch.rewindTo === null) await branch.#refetch();
    await branch.sync();
    if (snapshot.isRunning) branch.#startStream("GET");
    return branch;
  }

  /** Replace the text by the server's. */
  async #fetch() {
    this.#adopt(await this.#api.call("GET", this.path));
    const answer = await this.#api.call("GET", `${this.path}/text`);
    this.start = answer.from;
    this.chars = Array.from(answer.text);
    this.serverEnd = answer.to;
    this.rewindTo = null;
    this.#textChanged(0);
  }

  /** Read again which text the server has, if it still has the session. */
  async #refetch() {
    try {
      await this.#fetch();
    } catch (error) {
      if (!SESSION_LOST_CODES.has(error.code)) throw error;
      await this.#recover(error);
    }
  }

  /**
   * Append a text. It is composed together with the characters that are not sent yet, because a mark may join with the
   * letter before it. The model must know all of its characters.
   */
  append(text) {
    this.stop();
    const sentTo = this.rewindTo ?? Math.min(Math.max(this.serverEnd, this.#inFlightEnd), this.end);
    const sentEnd = Math.max(sentTo, this.start) - this.start;
    const unsent = this.chars.slice(sentEnd);
    const chars = this.model.charset.read(unsent.join("") + text);
    this.chars.length = sentEnd;
    for (const char of chars) this.chars.push(char);
    const isUnchanged = unsent.every((char, i) => char === chars[i]);
    this.#textChanged(isUnchanged ? sentEnd + unsent.length : sentEnd);
    this.sync();
  }

  /**
   * Append characters. The server replaces those that the model doesn't know by similar ones ("fold") or leaves
   * them out ("drop"). Returns whether that was done. Throws ApiError if the server knows no similar ones.
   */
  appendAs(chars, unknownChars) {
    return this.#alone(async () => {
      const from = this.serverEnd;
      try {
        const body = { text: chars.join(""), position: from, num_next: 0, unknown_chars: unknownChars };
        const { position } = await this.#api.call("POST", `${this.path}/feed`, body);
        const { text } = await this.#api.call("GET", `${this.path}/text?from=${from}&to=${position}`);
        this.serverEnd = position;
        if (this.rewindTo !== null) return true; // the user has deleted text meanwhile, which the server is told next
        this.chars.splice(from - this.start, 0, ...text);
        this.#textChanged(from - this.start);
        return true;
      } catch (error) {
        if (error.code === "unknown_characters") throw error;
        await this.#recover(error);
        return false;
      }
    });
  }

  /** Run an operation on the server's session while nothing else is sent to it. What changes meanwhile is sent after it. */
  async #alone(operation) {
    this.stop();
    do await this.sync();
    while (this.#syncing);
    this.#inFlightEnd = Infinity;
    const result = operation().finally(() => (this.#inFlightEnd = 0));
    const syncAgain = () => {
      this.#syncing = null;
      return this.sync();
    };
    this.#syncing = result.then(syncAgain, syncAgain);
    return result;
  }

  /** Remove the text from a position on. */
  rewind(position) {
    this.stop();
    if (position >= this.end) return;
    this.chars.length = position - this.start;
    if (position < Math.max(this.serverEnd, this.#inFlightEnd)) this.rewindTo = Math.min(position, this.rewindTo ?? position);
    this.#textChanged(this.chars.length);
    this.sync();
  }

  /** Return a branch with a new session, which has the text up to a position. */
  async fork(position, name) {
    this.stop();
    await this.sync();
    const session = await this.#api.call("POST", `${this.path}/fork`, { id: randomId(), position });
    const other = new Branch(this.#api, this.#models, this.model, name, session);
    other.runSeed = this.runSeed;
    other.past = this.past;
    other.start = this.start;
    other.chars = this.chars.slice(0, position - this.start);
    return other;
  }

  /** Let another model read the text. Throws ApiError and changes nothing if it can't. */
  rebase(model) {
    return this.#alone(async () => {
      const body = { text: "", position: this.serverEnd, rebase: model.id, num_next: 0 };
      await this.#api.call("POST", `${this.path}/feed`, body);
      const session = await this.#api.call("GET", this.path);
      // The model has read what the server retains. Model and text change in one step: until then, what was read of the
      // text belongs to the model before.
      this.chars.splice(0, session.text_from - this.start);
      this.start = session.text_from;
      this.model = model;
      this.#textChanged(0);
    });
  }

  /** Return {state, position, model, seed}: the session's signed state, from which any server with its key can continue. */
  async portableState() {
    this.stop();
    await this.sync();
    return this.#api.call("GET", `${this.path}/state`);
  }

  /** Delete the session on the server. */
  async delete() {
    this.stop();
    await this.#syncing;
    await this.#api.call("DELETE", this.path);
  }

  /** Send the server what it lacks; resolves when it has everything. At most one synchronisation runs at a time. */
  sync() {
    if (!this.#isServerBehind && !this.#syncing) return Promise.resolve();
    this.#syncing ??= this.#sendChanges().then((isDone) => {
      this.#syncing = null;
      if (isDone) return this.sync(); // sends what was typed meanwhile
    });
    return this.#syncing;
  }

  async #sendChanges() {
    try {
      while (this.#isServerBehind) await (this.rewindTo === null ? this.#feed() : this.#rewindServer());
      return true;
    } catch (error) {
      return await this.#recover(error);
    } finally {
      this.#inFlightEnd = 0;
      this.dispatchEvent(new Event("synced"));
    }
  }

  async #rewindServer() {
    const position = this.rewindTo;
    await this.#api.call("POST", `${this.path}/rewind`, { position });
    this.serverEnd = position;
    if (this.rewindTo === position) this.rewindTo = null;
  }

  async #feed() {
    const from = this.serverEnd - this.start;
    const batch = this.chars.slice(from, from + this.maxFeedChars);
    this.#inFlightEnd = this.serverEnd + batch.length;
    const body = { text: batch.join(""), position: this.serverEnd, num_next: 0 };
    try {
      const { position } = await this.#api.call("POST", `${this.path}/feed`, body);
      if (position !== this.#inFlightEnd) throw new Error("The server and this page disagree on the length of the text.");
      this.serverEnd = position;
    } catch (error) {
      if (error.code !== "position_conflict" || !(await this.#skipReceived())) throw error;
    }
  }

  /**
   * Skip the characters that the server has already: the page was reloaded before it got the answer to a request. Returns
   * whether there are any.
   */
  async #skipReceived() {
    const { text, from, to } = await this.#api.call("GET", `${this.path}/text?from=${this.serverEnd}`);
    const received = Array.from(text);
    const isOurs = from === this.serverEnd && received.every((char, i) => char === this.chars[from - this.start + i]);
    if (isOurs) this.serverEnd = to;
    return isOurs && received.length > 0;
  }

  /**
   * Handle an error of a call. If the server lost the session and the page has the whole text, create a new, empty session
   * with the same seed and return true: the text can be sent again. Otherwise show the error, replace the text by the
   * server's if there is one, and return false.
   */
  async #recover(error) {
    try {
      if (!SESSION_LOST_CODES.has(error.code) || this.start > 0) {
        this.#showMessage(error.message);
        await this.#fetch();
        return false;
      }
      const body = { model: this.model.id, seed: this.seed };
      this.#adopt(await this.#api.call("PUT", `v1/sessions/${randomId()}`, body));
      this.rewindTo = null;
      this.#showMessage("The server no longer had this text, so the page sends it again.");
      return true;
    } catch (nextError) {
      this.#showMessage(nextError.message);
      return false;
    }
  }

  /** Generate a continuation. settings: fields of the API's generate call. */
  async generate(settings) {
    await this.sync();
    if (!this.isRunning) this.#startStream("POST", { ...settings, stream: true, position: this.serverEnd });
  }

  /** Stop generating. The text ends where the page shows it; what the server generated after that is rewound. */
  stop() {
    if (!this.isRunning) return;
    this.#run.abort();
    this.#run = null;
    this.rewindTo = Math.min(this.serverEnd, this.rewindTo ?? this.serverEnd);
    this.dispatchEvent(new Event("run"));
    this.sync();
  }

  /** Read a stream to its end and resume it whenever the connection breaks. */
  async #startStream(method, body) {
    const run = (this.#run = new AbortController());
    const [begin, seedBefore] = [this.serverEnd, this.runSeed];
    if (body) this.runSeed = body.seed ?? this.seed;
    this.dispatchEvent(new Event("run"));
    try {
      let events = this.#api.events(method, `${this.path}/generate`, body, this.#resumeHeaders(method), run.signal);
      while (!(await this.#readStream(events, run))) {
        await pause(RESUME_PAUSE_MS, run.signal);
        events = this.#api.events("GET", `${this.path}/generate`, undefined, this.#resumeHeaders("GET"), run.signal);
      }
    } catch (error) {
      if (run.signal.aborted) return; // stop() has already cleaned up
      if (this.serverEnd === begin) this.runSeed = seedBefore; // it generated nothing
      await this.#recover(error);
    }
    if (this.#run === run) this.#run = null;
    this.dispatchEvent(new Event("run"));
    this.sync();
  }

  #resumeHeaders(method) {
    return method === "GET" ? { "Last-Event-ID": String(this.serverEnd) } : {};
  }

  /** Append the text of a stream's events. Returns whether the run is done; false if the stream must be resumed. */
  async #readStream(events, run) {
    for await (const { id, kind, data } of events) {
      run.signal.throwIfAborted();
      if (kind === "done") return true;
      if (kind === "error" && !data.error.retry) throw new ApiError(200, data.error); // else the stream may be resumed
      if (kind !== "text") return false;
      const chars = Array.from(data.text);
      const fresh = chars.slice(Math.max(0, chars.length - (id - this.serverEnd)));
      for (const char of fresh) this.chars.push(char);
      this.serverEnd = id;
      if (fresh.length) this.#textChanged(this.chars.length - fresh.length);
    }
    run.signal.throwIfAborted();
    return false;
  }

  #textChanged(from) {
    this.dispatchEvent(new CustomEvent("text", { detail: from }));
  }

  #showMessage(message) {
    this.dispatchEvent(new CustomEvent("message", { detail: message }));
  }
}
