// Draws one step of the network: the character, its embedding, the gates, the hidden states and the probabilities.

import { describe, visible } from "./charset.js";
import { float16Value, formatNumber, gridColumns, paintCells, readColourScale } from "./numbers.js";

const NUM_BARS = 12;
const LARGEST_EMBEDDING = 0.25; // absolute value that gets the last colour; embeddings are smaller than states
const GRIDS = ["before", "reset", "candidate", "update", "state"];
const NO_CHARACTER = "The network reads one character at a time.";
const NO_UNIT = "Choose a unit to see how its new value is computed.";
const byId = (id) => document.getElementById(id);

/**
 * Dispatches `unit` (detail: the number of the unit that was clicked), `layer` (detail: the layer that was chosen) and
 * `model` (another model is shown).
 */
export class Network extends EventTarget {
  unit = null; // the chosen unit of the model
  layer = 0; // the layer that is shown
  #model = null;
  #choices = new Map(); // id of a model -> its {unit, layer}: a unit of one model has nothing to do with that of another
  #step = null;
  #scale = readColourScale();
  #bars = Array.from({ length: NUM_BARS }, () => makeBar(byId("bars")));

  constructor() {
    super();
    for (const id of GRIDS) {
      byId(id).addEventListener("click", (event) => this.#emit("unit", this.#unitAt(event)));
      byId(id).addEventListener("pointermove", (event) => this.#showUnitNumber(event));
    }
    byId("layer").addEventListener("change", (event) => this.#emit("layer", Number(event.target.value)));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#scale = readColourScale();
      this.#paint();
    });
  }

  #emit(kind, detail) {
    if (detail !== null) this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  /** The model whose steps are shown. */
  get model() {
    return this.#model;
  }

  /** Show steps of this model from now on, with the unit and the layer that were chosen for it. */
  setModel(model) {
    if (model === this.#model) return;
    if (this.#model) this.#choices.set(this.#model.id, { unit: this.unit, layer: this.layer });
    this.#model = model;
    ({ unit: this.unit, layer: this.layer } = this.#choices.get(model.id) ?? { unit: null, layer: model.layers - 1 });
    const fill = (selector, count) => {
      for (const element of document.querySelectorAll(selector)) setTextOf(element, count.toLocaleString("en"));
    };
    const units = `${model.units.toLocaleString("en")} units`;
    setText("all-units", model.layers > 1 ? `${units} × ${model.layers} layers` : units);
    fill(".num-state", model.units * model.layers);
    fill(".num-units", model.units);
    fill(".num-embedding", model.embedding);
    byId("unit").max = model.units - 1;
    byId("unit").value = this.unit ?? "";
    const options = Array.from({ length: model.layers }, (_, layer) => new Option(layer + 1, layer, false, layer === this.layer));
    byId("layer").replaceChildren(...options);
    byId("layer-label").hidden = model.layers === 1;
    byId("of-layer").hidden = model.layers === 1;
    this.show(null);
    this.dispatchEvent(new Event("model"));
  }

  /** Show a step: {char, following} with the fields of Inspector.get; null to clear everything. */
  show(step) {
    this.#step = step;
    this.#paint();
  }

  #ofLayer(bits) {
    const { units } = this.#model;
    return bits?.subarray(this.layer * units, (this.layer + 1) * units) ?? null;
  }

  #paint() {
    if (!this.#model) return;
    const [step, { units, embedding, charset }] = [this.#step, this.#model];
    const details = step?.details;
    const columns = gridColumns(units);
    const allLayers = {
      before: step?.before, reset: details?.reset, candidate: details?.candidate, update: details?.update, state: step?.after,
    };
    const grids = Object.fromEntries(GRIDS.map((id) => [id, this.#ofLayer(allLayers[id])]));
    for (const id of GRIDS) paintCells(byId(id), grids[id], columns, this.#scale);
    paintCells(byId("embedding"), details?.embedding ?? null, Math.ceil(embedding / 8), this.#scale, LARGEST_EMBEDDING);
    setText("glyph", step ? visible(step.char) : "·");
    setText("char-label", step ? `${describe(step.char)}: number ${charset.index(step.char) + 1} of the model's ${charset.size} characters.` : NO_CHARACTER);
    this.#paintBars(step);
    this.#paintUnit(grids, columns);
  }

  /** Show the most likely next characters. The character that follows in the text is added if its probability is known. */
  #paintBars(step) {
    const distribution = step?.next ?? [];
    const rows = distribution.slice(0, NUM_BARS);
    const following = step?.following;
    if (following !== undefined && !rows.some(([char]) => char === following)) {
      const entry = distribution.find(([char]) => char === following);
      if (entry) rows[NUM_BARS - 1] = entry;
    }
    this.#bars.forEach((fill, i) => fill(rows[i], rows[i]?.[0] === following));
  }

  /** Outline the chosen unit in the grid of the new state, and show how its value was computed. */
  #paintUnit(grids, columns) {
    const { unit } = this;
    const rows = Math.ceil(this.#model.units / columns);
    const outline = byId("chosen");
    outline.hidden = unit === null;
    if (unit === null) return setText("sum", NO_UNIT);
    outline.style.left = `${(100 * (unit % columns)) / columns}%`;
    outline.style.top = `${(100 * Math.floor(unit / columns)) / rows}%`;
    outline.style.width = `${100 / columns}%`;
    outline.style.height = `${100 / rows}%`;
    if (GRIDS.some((id) => !grids[id])) return setText("sum", `Unit ${unit}`);
    const [old, , candidate, update, state] = GRIDS.map((id) => formatNumber(float16Value(grids[id][unit])));
    setText("sum", `Unit ${unit}: (1 − update) · candidate + update · old = (1 − ${update}) · ${candidate} + ${update} · ${old} = ${state}`);
  }

  #unitAt({ currentTarget: canvas, offsetX, offsetY }) {
    const column = Math.floor((offsetX / canvas.clientWidth) * canvas.width);
    const row = Math.floor((offsetY / canvas.clientHeight) * canvas.height);
    const unit = row * canvas.width + column;
    return column >= 0 && column < canvas.width && unit >= 0 && unit < (this.#model?.units ?? 0) ? unit : null;
  }

  #showUnitNumber(event) {
    const unit = this.#unitAt(event);
    event.currentTarget.title = unit === null ? "" : `unit ${unit}`;
  }
}

/** Append a row for one character of the distribution. Returns the function that fills the row. */
function makeBar(list) {
  const row = list.appendChild(document.createElement("li"));
  const [char, bar, share] = ["b", "i", "span"].map((name) => row.appendChild(document.createElement(name)));
  return (entry, isFollowing) => {
    row.hidden = !entry;
    if (!entry) return;
    char.textContent = visible(entry[0]);
    bar.style.width = `${50 * entry[1]}%`;
    share.textContent = `${(100 * entry[1]).toFixed(1)} %${isFollowing ? " ← actual" : ""}`;
    row.classList.toggle("drawn", isFollowing);
  };
}

function setTextOf(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const setText = (id, text) => setTextOf(byId(id), text);
