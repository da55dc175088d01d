// The models that the server has.

import { Charset } from "./charset.js";

const read = ({ id, meta }) => ({
  id, charset: new Charset(meta.charset), units: meta.num_units, layers: meta.num_layers, embedding: meta.embedding_dim,
});

/** Models {id, charset, units, layers, embedding} by name@version. */
export class Models {
  #api;
  #known = new Map();

  constructor(api) {
    this.#api = api;
  }

  /** The ids of all of them. */
  async list() {
    const { data } = await this.#api.call("GET", "v1/models");
    for (const found of data) this.#known.set(found.id, read(found));
    return data.map(({ id }) => id);
  }

  async get(id) {
    if (!this.#known.has(id)) this.#known.set(id, read(await this.#api.call("GET", `v1/models/${id}`)));
    return this.#known.get(id);
  }
}
