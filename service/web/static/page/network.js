// The pictures of one step: a character and the state before it become the new state.

import { named, shown } from "./charset.js";
import { columnsOf, digits, float, paintCells, readScale } from "./numbers.js";

const NUM_BARS = 12;
const GRIDS = ["before", "reset", "candidate", "update", "state"];
const byId = (id) => document.getElementById(id);

/** Dispatches `unit` (detail: its number) when one is clicked, `layer`. */
export class Network extends EventTarget {
  unit = null;
  layer = 0;
  #model = null;
  #seen = null;
  #scale = readScale();
  #bars = Array.from({ length: NUM_BARS }, () => makeBar(byId("bars")));

  constructor() {
    super();
    for (const id of GRIDS) {
      byId(id).addEventListener("click", (event) => this.#tell("unit", this.#unitAt(event)));
      byId(id).addEventListener("pointermove", (event) => this.#sayUnit(event));
    }
    byId("layer").addEventListener("change", (event) => this.#tell("layer", Number(event.target.value)));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#scale = readScale();
      this.#paint();
    });
  }

  #tell(kind, detail) {
    if (detail !== null) this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  /** model: {units, layers, embedding, charset}. */
  use(model) {
    if (model === this.#model) return;
    this.#model = model;
    const say = (name, count) => document.querySelectorAll(name).forEach((place) => (place.textContent = count.toLocaleString("en")));
    say(".num-units", model.units);
    say(".num-embedding", model.embedding);
    byId("unit").max = model.units - 1;
    this.layer = model.layers - 1;
    const options = Array.from({ length: model.layers }, (_, layer) => new Option(layer + 1, layer, false, layer === this.layer));
    byId("layer").replaceChildren(...options);
    byId("layer-label").hidden = model.layers === 1;
    if (this.unit !== null && this.unit >= model.units) this.unit = null;
    this.show(null);
  }

  /** seen: {char, following, before, after, details, next, largest}: of Watch.look, or null. */
  show(seen) {
    this.#seen = seen;
    this.#paint();
  }

  #of(bits) {
    const { units } = this.#model;
    return bits?.subarray(this.layer * units, (this.layer + 1) * units) ?? null;
  }

  #paint() {
    if (!this.#model) return;
    const [seen, { units, embedding, charset }] = [this.#seen, this.#model];
    const details = seen?.details;
    const columns = columnsOf(units);
    const bits = {
      before: seen?.before, reset: details?.reset, candidate: details?.candidate, update: details?.update, state: seen?.after,
    };
    for (const id of GRIDS) paintCells(byId(id), this.#of(bits[id]), columns, this.#scale);
    paintCells(byId("embedding"), details?.embedding ?? null, Math.ceil(embedding / 8), this.#scale, 0.25);
    set("glyph", seen ? shown(seen.char) : "·");
    set("char-said", seen ? `${named(seen.char)}: number ${charset.number(seen.char) + 1} of the ${charset.size} that this model knows.` : "One character is read at a time.");
    this.#paintBars(seen);
    this.#paintUnit(Object.fromEntries(GRIDS.map((id) => [id, this.#of(bits[id])])), columns);
  }

  #paintBars(seen) {
    const all = seen?.next ?? [];
    const rows = all.slice(0, NUM_BARS);
    const drawn = seen?.following;
    if (drawn !== undefined && !rows.some(([char]) => char === drawn)) {
      const found = all.find(([char]) => char === drawn);
      if (found) rows[NUM_BARS - 1] = found;
    }
    this.#bars.forEach((bar, i) => bar(rows[i], rows[i]?.[0] === drawn));
  }

  /** The chosen unit's place in the grid, and how its number came about. */
  #paintUnit(bits, columns) {
    const { unit } = this;
    const rows = Math.ceil(this.#model.units / columns);
    const frame = byId("chosen");
    frame.hidden = unit === null;
    if (unit === null) return set("sum", "Choose a unit to see its sum.");
    frame.style.left = `${(100 * (unit % columns)) / columns}%`;
    frame.style.top = `${(100 * Math.floor(unit / columns)) / rows}%`;
    frame.style.width = `${100 / columns}%`;
    frame.style.height = `${100 / rows}%`;
    if (GRIDS.some((id) => !bits[id])) return set("sum", `Unit ${unit}`);
    const [before, , candidate, update, state] = GRIDS.map((id) => float(bits[id][unit]));
    set("sum", `Unit ${unit}: (1 − update) · candidate + update · before = (1 − ${digits(update)}) · ${digits(candidate)} + ${digits(update)} · ${digits(before)} = ${digits(state)}`);
  }

  #unitAt({ currentTarget: canvas, offsetX, offsetY }) {
    const column = Math.floor((offsetX / canvas.clientWidth) * canvas.width);
    const row = Math.floor((offsetY / canvas.clientHeight) * canvas.height);
    const unit = row * canvas.width + column;
    return column >= 0 && column < canvas.width && unit >= 0 && unit < (this.#model?.units ?? 0) ? unit : null;
  }

  #sayUnit(event) {
    const unit = this.#unitAt(event);
    event.currentTarget.title = unit === null ? "" : `unit ${unit}`;
  }
}

/** One row of the distribution; a function that fills it. */
function makeBar(list) {
  const row = list.appendChild(document.createElement("li"));
  const [char, bar, share] = ["b", "i", "span"].map((name) => row.appendChild(document.createElement(name)));
  return (entry, isDrawn) => {
    row.hidden = !entry;
    if (!entry) return;
    char.textContent = shown(entry[0]);
    bar.style.width = `${50 * entry[1]}%`;
    share.textContent = `${(100 * entry[1]).toFixed(1)} %${isDrawn ? " ← came" : ""}`;
    row.classList.toggle("drawn", isDrawn);
  };
}

function set(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}
