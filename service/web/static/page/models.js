// The models that the server offers.

import { Charset } from "./charset.js";

const parse = ({ id, meta }) => ({
  id, charset: new Charset(meta.charset), units: meta.num_units, layers: meta.num_layers, embedding: meta.embedding_dim,
});

/** Loads and caches models {id, charset, units, layers, embedding}. An id is name@version. */
export class Models {
  #api;
  #cache = new Map();

  constructor(api) {
    this.#api = api;
  }

  /** Return the ids of all models. */
  async list() {
    const { data } = await this.#api.call("GET", "v1/models");
    for (const entry of data) this.#cache.set(entry.id, parse(entry));
    return data.map(({ id }) => id);
  }

  async get(id) {
    if (!this.#cache.has(id)) this.#cache.set(id, parse(await this.#api.call("GET", `v1/models/${id}`)));
    return this.#cache.get(id);
  }
}
