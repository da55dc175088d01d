// Joins the parts of the page: texts side by side, and the network at work on the one that is active.

import { Api } from "./api.js";
import { Branch } from "./branch.js";
import { named } from "./charset.js";
import { Column } from "./column.js";
import { download, read } from "./files.js";
import { Models } from "./models.js";
import { Network } from "./network.js";
import { digits, float } from "./numbers.js";
import { Player } from "./player.js";
import { ranked } from "./ranking.js";
import { Saved } from "./saved.js";
import { Watch } from "./watch.js";

const byId = (id) => document.getElementById(id);
const SURPRISING = 6; // nats that get the last colour
const NOTE_MS = 10_000;
const RANKING_REST_MS = 400;

const columns = [];
let active = null;

// What there is to say

let [trouble, note, noteTimer] = [null, null, null];

function say() {
  byId("trouble").textContent = trouble ?? note ?? "";
}

function tell(message) {
  note = message;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => tell(null), NOTE_MS);
  say();
}

function askKey(message) {
  const dialog = byId("key");
  byId("key-said").textContent = message;
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const { key } = event.target.elements;
      dialog.close();
      resolve(key.value.trim());
      key.value = "";
    };
  });
}

const api = new Api(askKey, (message) => {
  trouble = message;
  say();
});
const models = new Models(api);
const network = new Network();
const player = new Player(() => active.step(1));
const saved = new Saved(() => ({ active: columns.indexOf(active), branches: columns.map(({ branch }) => branch.saved) }));

/** For handlers: what goes wrong is said. */
const saying = (work) => (...given) => work(...given).catch((error) => tell(error.message));

// Drawing, once a frame at most

let isDrawing = false;

function redraw() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    for (const column of columns) column.render(column === active, colouring(column));
    if (active) drawActive();
    saved.changed();
  });
}

function drawActive() {
  const { branch, watch, shown } = active;
  const { chars } = branch;
  network.use(branch.model);
  byId("model").value = branch.model.id;
  const isSeen = shown >= 0 && shown < chars.length;
  network.show(isSeen ? { char: chars[shown], following: chars[shown + 1], ...watch.look(shown) } : null);
  set(byId("go"), branch.isRunning ? "Stop" : "Continue");
  byId("last").disabled = active.cursor === null;
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Colouring

const chosenColouring = () => document.querySelector("#colouring input:checked").value;

/** index -> -1 to 1 for the texts' characters; null: none. */
function colouring({ watch, branch }) {
  const kind = chosenColouring();
  if (kind === "surprise") return (i) => Math.min(1, watch.surprises[i] / SURPRISING);
  if (kind === "none" || network.unit === null) return null;
  if (network.unit >= branch.model.units || network.layer >= branch.model.layers) return null;
  const at = network.layer * branch.model.units + network.unit;
  return (i) => (watch.states[i] ? float(watch.states[i][at]) : NaN);
}

function recolour() {
  for (const column of columns) column.unpaint();
  byId("legend").className = chosenColouring();
  redraw();
}

function choose(unit) {
  network.unit = unit;
  byId("unit").value = unit ?? "";
  document.querySelector(`#colouring [value=${unit === null ? "none" : "unit"}]`).checked = true;
  recolour();
}

// The ranking of units

let rankingTimer = null;
let ranking = new AbortController();

function rankLater() {
  clearTimeout(rankingTimer);
  ranking.abort();
  if (byId("ranking").open) rankingTimer = setTimeout(rank, RANKING_REST_MS);
}

async function rank() {
  ranking = new AbortController();
  const { branch, watch } = active;
  const found = await ranked(branch.chars, watch.states, branch.model.units, network.layer, ranking.signal).catch(() => null);
  if (!found) return;
  const rows = found.map(([name, units]) => {
    const row = document.createElement("tr");
    const [head, cell] = [document.createElement("th"), document.createElement("td")];
    head.scope = "row";
    head.textContent = name;
    for (const [unit, r] of units) {
      const button = cell.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = `${unit} (${digits(r)})`;
      button.setAttribute("aria-label", `unit ${unit}, correlation ${digits(r)} with ${name}`);
      button.addEventListener("click", () => choose(unit));
    }
    row.append(head, cell);
    return row;
  });
  byId("ranking").querySelector("tbody").replaceChildren(...rows);
}

// Texts

function add(branch, behind = columns.at(-1)) {
  const watch = new Watch(api, branch);
  const column = new Column(byId("column"), branch, watch);
  if (behind) behind.element.after(column.element);
  else byId("columns").append(column.element);
  columns.splice(columns.indexOf(behind) + 1, 0, column);
  for (const source of [branch, watch]) source.addEventListener("note", ({ detail }) => tell(detail));
  for (const kind of ["run", "sent"]) branch.addEventListener(kind, redraw);
  watch.addEventListener("seen", () => {
    redraw();
    if (column === active) rankLater();
  });
  column.addEventListener("look", redraw);
  column.addEventListener("active", () => activate(column));
  column.addEventListener("fork", saying(async ({ detail }) => fork(column, detail)));
  column.addEventListener("close", saying(async () => close(column)));
  activate(column);
  return column;
}

function activate(column) {
  if (active === column) return;
  active?.element.classList.remove("active");
  active = column;
  column.element.classList.add("active");
  column.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  player.pause();
  rankLater();
  redraw();
}

async function fork(column, length) {
  const { branch } = column;
  const position = branch.first + length;
  const tail = branch.chars.slice(Math.max(0, length - 12), length).join("").replaceAll("\n", "⏎");
  add(await branch.fork(position, `parted at ${position}: …${tail}`), column).focus();
}

async function close(column) {
  if (columns.length === 1) add(await Branch.create(api, models, "a text", { model: column.branch.model.id }));
  columns.splice(columns.indexOf(column), 1);
  column.remove();
  if (active === column) activate(columns[0]);
  redraw();
  await column.branch.forget();
}

async function useModel(id) {
  const { branch } = active;
  const column = active;
  try {
    if (branch.end > 0) return await branch.rebase(await models.get(id));
    add(await Branch.create(api, models, branch.name, { model: id }), column);
    await close(column);
  } finally {
    redraw(); // the choice shows what is so
  }
}

async function goOn(form) {
  const { branch, rest } = active;
  if (branch.isRunning) return branch.stop();
  if (rest.length) return tell(`Remove ${named(rest[0])} first: the model doesn't know it.`);
  player.pause();
  active.look(null);
  const { seed, ...numbers } = Object.fromEntries(new FormData(form));
  const settings = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, Number(value)]));
  if (seed !== "") settings.seed = Number(seed);
  await branch.generate(settings);
}

async function open(file) {
  const { state, text } = await read(file);
  const branch = await Branch.create(api, models, file.name, { state });
  branch.past = text;
  add(branch).focus();
}

async function save() {
  const { branch } = active;
  download(await branch.state(), branch.past + branch.chars.join(""));
}

// What can be pressed

function listen() {
  byId("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    saying(goOn)(event.target);
  });
  byId("model").addEventListener("change", ({ target }) => saying(useModel)(target.value));
  byId("save").addEventListener("click", saying(save));
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (file) saying(open)(file);
    target.value = "";
  });
  byId("new").addEventListener("click", saying(async () => add(await Branch.create(api, models, "a text", { model: active.branch.model.id })).focus()));
  byId("back").addEventListener("click", () => active.step(-1));
  byId("forth").addEventListener("click", () => active.step(1));
  byId("last").addEventListener("click", () => active.look(null));
  byId("play").addEventListener("click", () => (player.isPlaying ? player.pause() : play()));
  player.addEventListener("playing", () => set(byId("play"), player.isPlaying ? "Pause" : "Play"));
  byId("speed").addEventListener("input", ({ target }) => {
    player.speed = Number(target.value);
    byId("speed-is").textContent = target.value;
  });
  network.addEventListener("unit", ({ detail }) => choose(detail));
  network.addEventListener("layer", ({ detail }) => {
    network.layer = detail;
    rankLater();
    recolour();
  });
  byId("unit").addEventListener("input", ({ target }) => choose(target.value !== "" && target.validity.valid ? Number(target.value) : null));
  byId("colouring").addEventListener("change", recolour);
  byId("ranking").addEventListener("toggle", rankLater);
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.target.matches("input, textarea, select") && !event.altKey && !event.metaKey) active.step(by);
  });
}

/** From where the text is looked at; from its beginning, if that is the end. */
function play() {
  if (active.cursor === null || active.cursor === active.branch.chars.length - 1) active.look(0);
  player.play();
}

async function begin() {
  const found = Saved.read();
  byId("model").replaceChildren(...(await models.list()).map((id) => new Option(id, id)));
  for (const one of found?.branches ?? []) {
    await saying(async () => add(await Branch.restore(api, await models.get(one.model), one)))();
  }
  if (!columns.length) add(await Branch.create(api, models, "a text"));
  activate(columns[found?.active] ?? columns[0]);
  listen();
  active.focus();
  document.body.classList.add("ready");
}

saying(begin)();
