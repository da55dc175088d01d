// HTTP calls to the service: adds the API key, retries calls that may succeed later, reads event streams.

import { readItem, writeItem } from "./tabstorage.js";

const KEY = "gru-serve.key"; // name of the tab's stored API key, which is deleted when the tab is closed
const RETRYABLE_STATUSES = new Set([429, 502, 503, 504]);
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2000;
const UNREACHABLE = "The server can't be reached. Trying again …";
const GIVE_UP_AFTER_MS = 60_000; // while the server answers but refuses; an unreachable server is retried without end

/** An error response of the service. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? "The response does not come from gru-serve.");
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.position = error.position ?? null;
  }
}

/** Resolve after `ms` milliseconds. Rejects with the signal's reason if it is aborted first. */
export const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

/**
 * A client of the service.
 * askKey(message): asks the user for an API key and resolves to it.
 * onProblem(message): a call is failing and is retried; null once no call is.
 */
export class Api {
  #key = readItem(KEY); // the API key; null if the server has not asked for one
  #askKey;
  #onProblem;
  #keyPrompt = null; // the promise of the key dialog while it is open
  #problems = new Map(); // call that fails and is retried -> message

  constructor(askKey, onProblem) {
    this.#askKey = askKey;
    this.#onProblem = onProblem;
  }

  /** Send a request that is safe to repeat and return the JSON of its response. Throws ApiError or the signal's reason. */
  async call(method, path, body, signal) {
    for (;;) {
      const response = await this.#send(method, path, body, {}, signal);
      try {
        return response.status === 204 ? null : await response.json();
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        await pause(FIRST_PAUSE_MS, signal); // the connection broke before the whole response arrived: repeat the request
      }
    }
  }

  /**
   * Yield the events {id, kind, data} of a stream. If the connection breaks, the generator ends after the last complete
   * event. Throws ApiError or the signal's reason.
   */
  async *events(method, path, body, headers, signal) {
    const response = await this.#send(method, path, body, headers, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch {
        return; // the connection broke: the caller resumes the stream
      }
      if (part.done) return;
      const blocks = (rest + part.value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
        if (fields.data) yield { id: Number(fields.id), kind: fields.event, data: JSON.parse(fields.data) };
      }
    }
  }

  async #send(...request) {
    const call = Symbol("call");
    try {
      return await this.#sendUntilAccepted(call, ...request);
    } finally {
      this.#setProblem(call, null); // it succeeded, was given up, or was aborted
    }
  }

  /** Set or clear (null) the problem of a call, and report the latest problem of all calls. */
  #setProblem(call, message) {
    if (message === null) this.#problems.delete(call);
    else this.#problems.set(call, message);
    this.#onProblem([...this.#problems.values()].at(-1) ?? null);
  }

  async #sendUntilAccepted(call, method, path, body, headers, signal) {
    const started = performance.now();
    for (let backoff = FIRST_PAUSE_MS; ; backoff = Math.min(2 * backoff, LONGEST_PAUSE_MS)) {
      let retryAfterMs = 0;
      try {
        const response = await fetch(path, {
          method,
          headers: this.#headers(headers),
          body: body === undefined ? undefined : JSON.stringify(body),
          signal,
          cache: "no-store",
        });
        // The server answers, so no other call may still say that it can't be reached.
        for (const [other, message] of this.#problems) if (message === UNREACHABLE) this.#problems.delete(other);
        if (response.ok) return response;
        const error = new ApiError(response.status, (await response.json().catch(() => ({}))).error ?? {});
        if (error.status === 401) {
          await this.#replaceKey(error.message);
          continue;
        }
        const isRetryable = RETRYABLE_STATUSES.has(error.status) || error.code === "session_busy";
        retryAfterMs = 1000 * (Number(response.headers.get("Retry-After")) || 0); // 0 also if it is a date
        if (!isRetryable || performance.now() - started + retryAfterMs > GIVE_UP_AFTER_MS) throw error;
        if (error.code !== "session_busy") this.#setProblem(call, `${error.message} Trying again …`);
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        if (error instanceof ApiError) throw error;
        this.#setProblem(call, UNREACHABLE);
      }
      await pause(Math.max(backoff, retryAfterMs), signal);
    }
  }

  #headers(extra) {
    const headers = { "Content-Type": "application/json", ...extra };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    return headers;
  }

  /** Ask the user for a key. Calls that are refused at the same time share one dialog. */
  async #replaceKey(message) {
    this.#keyPrompt ??= this.#askKey(message).finally(() => (this.#keyPrompt = null));
    this.#key = await this.#keyPrompt;
    writeItem(KEY, this.#key);
  }
}
