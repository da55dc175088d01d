// Calls to the service: with the key, repeated where that may help, and streams of events.

const KEY = "gru-serve.key"; // in the session's storage only: it ends with the tab
const TRY_AGAIN = new Set([429, 502, 503, 504]);
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2000;
const PATIENCE_MS = 60_000; // with a server that answers, and refuses

/** What the server refused. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? "the answer is not this service's");
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.position = error.position ?? null;
  }
}

export const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

/** A server. askKey: resolves to a key that somebody entered. onTrouble(message, or null when it is over). */
export class Api {
  #askKey;
  #onTrouble;
  #asking = null;

  constructor(askKey, onTrouble) {
    this.#askKey = askKey;
    this.#onTrouble = onTrouble;
  }

  /** One call that may be repeated; the JSON of its answer. Throws ApiError, or the signal's reason. */
  async call(method, path, body, signal) {
    for (;;) {
      const response = await this.#send(method, path, body, {}, signal);
      try {
        return response.status === 204 ? null : await response.json();
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        await pause(FIRST_PAUSE_MS, signal); // the answer was cut: ask once more
      }
    }
  }

  /** Events {id, kind, data} of a stream, up to the last whole one, also if it is cut. Throws ApiError. */
  async *events(method, path, body, headers, signal) {
    const response = await this.#send(method, path, body, headers, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch {
        return; // cut: whoever reads takes it up again
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

  async #send(method, path, body, headers, signal) {
    const started = performance.now();
    for (let wait = FIRST_PAUSE_MS; ; wait = Math.min(2 * wait, LONGEST_PAUSE_MS)) {
      let least = 0;
      try {
        const response = await fetch(path, {
          method,
          headers: this.#headers(headers),
          body: body === undefined ? undefined : JSON.stringify(body),
          signal,
          cache: "no-store",
        });
        if (response.ok) {
          this.#onTrouble(null);
          return response;
        }
        const error = new ApiError(response.status, (await response.json().catch(() => ({}))).error ?? {});
        if (error.status === 401) {
          await this.#newKey(error.message);
          continue;
        }
        const mayPass = TRY_AGAIN.has(error.status) || error.code === "session_busy";
        if (!mayPass || performance.now() - started > PATIENCE_MS) throw error;
        least = 1000 * Number(response.headers.get("Retry-After") ?? 0);
        if (error.code !== "session_busy") this.#onTrouble(`${error.message} Trying again …`);
      } catch (error) {
        if (signal?.aborted) throw signal.reason;
        if (error instanceof ApiError) throw error;
        this.#onTrouble("The server can't be reached. Trying again …");
      }
      await pause(Math.max(wait, least), signal);
    }
  }

  #headers(more) {
    const headers = { "Content-Type": "application/json", ...more };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    return headers;
  }

  /** Several calls may meet the refusal at the same time: one question is asked. */
  async #newKey(message) {
    this.#asking ??= this.#askKey(message).finally(() => (this.#asking = null));
    sessionStorage.setItem(KEY, await this.#asking);
  }
}
