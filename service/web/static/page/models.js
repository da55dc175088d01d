// The models that the server offers, and its limits. Both may change while the page is open.

import { Charset } from "./charset.js";

const POLL_MS = 15_000;

const parse = ({ id, meta }) => ({
  id, charset: new Charset(meta.charset), units: meta.num_units, layers: meta.num_layers, embedding: meta.embedding_dim,
});

/** Loads and caches models {id, charset, units, layers, embedding}. An id is name@version. Dispatches `list` on a new list. */
export class Models extends EventTarget {
  ids = []; // of all models that the server offers
  limits = null; // {max_tokens, session_max_tokens, max_prompt_chars} of a request
  #api;
  #cache = new Map();
  #listing = null; // the promise of the list that is being loaded

  constructor(api) {
    super();
    this.#api = api;
  }

  /** Load the list of all models. */
  load() {
    this.#listing ??= this.#loadList().finally(() => (this.#listing = null));
    return this.#listing;
  }

  async #loadList() {
    const { data, limits } = await this.#api.call("GET", "v1/models");
    const versions = data.filter(({ id, meta }) => id === meta.version); // without names that stand for one of them
    for (const entry of versions) if (!this.#cache.has(entry.id)) this.#cache.set(entry.id, parse(entry));
    this.ids = versions.map(({ id }) => id);
    this.limits = limits;
    this.dispatchEvent(new Event("list"));
  }

  /** Load the list again from now on: now and then, and when the page is shown again. Not while the page is hidden. */
  follow() {
    const reload = () => {
      if (!document.hidden) this.load().catch(() => {}); // a later call tries again
    };
    setInterval(reload, POLL_MS);
    document.addEventListener("visibilitychange", reload);
  }

  async get(id) {
    if (!this.#cache.has(id)) this.#cache.set(id, parse(await this.#api.call("GET", `v1/models/${id}`)));
    return this.#cache.get(id);
  }
}
