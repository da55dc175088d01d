// Entry point of the page: connects the columns of text, the drawing of the network, and the controls.

import { Api } from "./api.js";
import { Branch } from "./branch.js";
import { describeAll } from "./charset.js";
import { Column } from "./column.js";
import { download, read } from "./files.js";
import { Inspector } from "./inspector.js";
import { Models } from "./models.js";
import { Network } from "./network.js";
import { float16Value, formatNumber } from "./numbers.js";
import { Player } from "./player.js";
import { rankUnits } from "./ranking.js";
import { Suggestions } from "./suggestions.js";
import { TabStorage } from "./tabstorage.js";

const byId = (id) => document.getElementById(id);
const MAX_SURPRISE = 6; // nats that get the last colour
const MESSAGE_MS = 10_000;
const RANKING_DELAY_MS = 400;

const columns = [];
let active = null; // the column that the controls act on

// Messages to the user

let problem = null; // of a request that is being repeated
let message = null; // {text, isTrue}

function showStatus() {
  if (message && !message.isTrue()) message = null;
  setText(byId("trouble"), problem ?? message?.text ?? "");
}

/**
 * Show a message for some time, at most as long as it is true. A problem with the server, as long as it lasts, is shown instead.
 * ms: Infinity for a message that stays.
 */
function showMessage(text, isTrue = () => true, ms = MESSAGE_MS) {
  const shown = (message = { text, isTrue });
  showStatus();
  if (ms === Infinity) return;
  setTimeout(() => {
    if (message === shown) message = null;
    showStatus();
  }, ms);
}

/** Show the key dialog and resolve to the key that the user enters. */
function askKey(reason) {
  const dialog = byId("key");
  byId("key-reason").textContent = reason;
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

const api = new Api(askKey, (text) => {
  problem = text;
  showStatus();
});
const models = new Models(api);
const network = new Network();
const player = new Player(() => active.step(1));
const unrestored = []; // snapshots of texts that could not be restored: another reload tries again
const storage = new TabStorage(() => {
  const branches = columns.map((column) => column.snapshot);
  return { active: columns.indexOf(active), branches: branches.concat(unrestored) };
});

/** Wrap an async event handler so that its errors are shown to the user. */
const reportingErrors = (handler) => (...args) => handler(...args).catch((error) => showMessage(error.message));

// Drawing, at most once per frame

let isRedrawScheduled = false;

function redraw() {
  if (isRedrawScheduled) return;
  isRedrawScheduled = true;
  requestAnimationFrame(() => {
    isRedrawScheduled = false;
    showStatus();
    if (active) network.setModel(active.branch.model);
    for (const column of columns) column.render(column === active, colouring(column));
    if (active) drawActive();
    storage.scheduleWrite();
  });
}

function drawActive() {
  const { branch, inspector, cursorIndex } = active;
  const { chars } = branch;
  byId("model").value = active.chosenModel?.id ?? branch.model.id;
  const hasCharacter = cursorIndex >= 0 && cursorIndex < chars.length;
  network.show(hasCharacter ? { char: chars[cursorIndex], following: chars[cursorIndex + 1], ...inspector.get(cursorIndex) } : null);
  setText(byId("go"), branch.isRunning ? "Stop" : "Continue");
  byId("last").disabled = active.cursor === null;
  drawLegend();
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Colouring

const chosenColouring = () => document.querySelector("#colouring input:checked").value;

/**
 * Return the function that maps an index of a column's text to a value from -1 to 1, or null if it gets no colours. The chosen
 * unit is one of the model that is shown: the text of another model has no such unit.
 */
function colouring({ inspector, branch }) {
  const kind = chosenColouring();
  if (kind === "surprise") return (i) => Math.min(1, inspector.surprises[i] / MAX_SURPRISE);
  if (kind === "none" || network.unit === null || branch.model !== network.model) return null;
  const offset = network.layer * branch.model.units + network.unit;
  return (i) => (inspector.states[i] ? float16Value(inspector.states[i][offset]) : NaN);
}

function recolour() {
  for (const column of columns) column.unpaint();
  redraw();
}

/** Say what the colours of the text mean: of what, and which numbers. */
function drawLegend() {
  const kind = chosenColouring();
  const legend = byId("legend");
  legend.hidden = kind === "none";
  legend.className = kind;
  if (kind === "none") return;
  const [title, ...ticks] = [legend.querySelector("p"), ...legend.querySelectorAll(".ticks span")];
  setText(title, kind === "unit" ? unitTitle() : "Surprise, in nats");
  const numbers = kind === "unit" ? ["−1", "0", "1"] : ["0", formatNumber(MAX_SURPRISE / 2, 0), `${MAX_SURPRISE} or more`];
  numbers.forEach((number, i) => setText(ticks[i], number));
}

function unitTitle() {
  const { unit, layer, model } = network;
  if (unit === null) return `No unit of ${model.id} is chosen: click one, or enter its number.`;
  const ofLayer = model.layers > 1 ? `, layer ${layer + 1}` : "";
  const others = columns.some(({ branch }) => branch.model !== model) ? ". Texts of other models have no colours." : "";
  return `Unit ${unit} of ${model.id}${ofLayer}${others}`;
}

/** Choose a unit and colour the text by it; null: no unit and no colours. */
function chooseUnit(unit) {
  network.unit = unit;
  byId("unit").value = unit ?? "";
  document.querySelector(`#colouring [value=${unit === null ? "none" : "unit"}]`).checked = true;
  recolour();
}

// The ranking of units

let rankingTimer = null;
let rankingAbort = new AbortController();

function scheduleRanking() {
  clearTimeout(rankingTimer);
  rankingAbort.abort();
  if (byId("ranking").open) rankingTimer = setTimeout(updateRanking, RANKING_DELAY_MS);
}

async function updateRanking() {
  rankingAbort = new AbortController();
  const { branch, inspector } = active;
  const { signal } = rankingAbort;
  if (branch.model !== network.model) return scheduleRanking(); // until the next frame shows the model
  const ranking = await rankUnits(branch.chars, inspector.states, branch.model.units, network.layer, signal).catch(() => null);
  if (!ranking) return;
  const rows = ranking.map(([feature, units]) => {
    const row = document.createElement("tr");
    const [head, cell] = [document.createElement("th"), document.createElement("td")];
    head.scope = "row";
    head.textContent = feature;
    for (const [unit, correlation] of units) {
      const button = cell.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = `${unit} (${formatNumber(correlation)})`;
      button.setAttribute("aria-label", `unit ${unit}, correlation ${formatNumber(correlation)} with: ${feature}`);
      button.addEventListener("click", () => chooseUnit(unit));
    }
    row.append(head, cell);
    return row;
  });
  byId("ranking").querySelector("tbody").replaceChildren(...rows);
}

// Columns

/** Show a branch in a new column after `previous` and make it the active one. */
function addColumn(branch, previous = columns.at(-1)) {
  const inspector = new Inspector(api, branch);
  const column = new Column(byId("column"), branch, inspector);
  column.suggestions = new Suggestions(api, column);
  if (previous) previous.element.after(column.element);
  else byId("columns").append(column.element);
  columns.splice(columns.indexOf(previous) + 1, 0, column);
  for (const source of [branch, inspector, column]) source.addEventListener("message", ({ detail }) => showMessage(detail));
  for (const kind of ["run", "synced"]) branch.addEventListener(kind, redraw);
  inspector.addEventListener("read", () => {
    redraw();
    if (column === active) scheduleRanking();
  });
  column.addEventListener("change", redraw);
  column.addEventListener("activate", () => activate(column));
  column.addEventListener("fork", reportingErrors(async ({ detail }) => fork(column, detail)));
  column.addEventListener("copy", reportingErrors(async ({ detail }) => copy(column, detail)));
  column.addEventListener("close", reportingErrors(async () => closeColumn(column)));
  activate(column);
  return column;
}

async function addNewText() {
  addColumn(await createText(active.branch.model.id)).focus();
}

/** Create a branch without text. modelId: default the server's default model. */
function createText(modelId) {
  return Branch.create(api, models, "Untitled text", modelId ? { model: modelId } : {});
}

function activate(column) {
  if (active === column) return;
  active?.element.classList.remove("active");
  active = column;
  column.element.classList.add("active");
  column.element.scrollIntoView({ block: "nearest", inline: "nearest" });
  player.pause();
  scheduleRanking();
  redraw();
}

/** Add a column with a branch that has the first `length` characters of a column's text. */
async function fork(column, length) {
  const { branch } = column;
  const position = branch.start + length;
  const tail = branch.chars.slice(Math.max(0, length - 12), length).join("").replaceAll("\n", "⏎");
  addColumn(await branch.fork(position, `Branch at ${position}: …${tail}`), column).focus();
}

/** Add a column in which another model reads a column's text, with what its unknown characters become: `fold` or `drop`. */
async function copy(column, { model, unknownChars }) {
  const { branch } = column;
  const text = branch.chars.join("");
  const other = addColumn(await Branch.create(api, models, branch.name, { model: model.id }), column);
  other.type(text);
  await other.sendUnknown(unknownChars);
}

/** Remove a column and delete its session. There is always at least one column. */
async function closeColumn(column) {
  const next = columns.length === 1 ? await createText(column.branch.model.id) : null;
  if (!columns.includes(column)) return next?.delete(); // it was closed meanwhile
  if (next) addColumn(next);
  columns.splice(columns.indexOf(column), 1);
  column.suggestions.remove();
  column.remove();
  if (active === column) activate(columns[0]);
  redraw();
  await column.branch.delete();
}

/** Replace a column by one of a new branch. What was typed while the server created that one is typed into it. */
async function replaceColumn(column, branch) {
  const hasFocus = column.element.contains(document.activeElement);
  const other = addColumn(branch, column);
  other.type(column.branch.chars.concat(column.unencodable).join(""));
  if (hasFocus) other.focus();
  await closeColumn(column);
}

/** Let another model read the active text. An empty text is replaced by one of that model. The last choice counts. */
async function useModel(id) {
  const column = active;
  const { branch } = column;
  const choice = (column.chosenModel = { id });
  try {
    const model = await models.get(id);
    if (branch.chars.some((char) => !model.charset.has(char))) return void (column.refusedModel = model);
    column.refusedModel = null;
    if (branch.end > 0) {
      await branch.rebase(model);
      return column.type(""); // the model may know what was typed and could not be sent
    }
    const other = await Branch.create(api, models, branch.name, { model: id });
    if (columns.includes(column) && column.chosenModel === choice) await replaceColumn(column, other);
    else await other.delete();
  } finally {
    if (column.chosenModel === choice) column.chosenModel = null;
    redraw(); // if the server refused, the menu shows the old model again
  }
}

async function generateOrStop(form) {
  const column = active;
  const { branch, unencodable } = column;
  const { charset, id } = branch.model;
  if (branch.isRunning) return branch.stop();
  if (unencodable.length) {
    const names = describeAll(charset.unknown(unencodable));
    return showMessage(`Replace, leave out or delete ${names} first: ${id} doesn't know it.`, () => column.unencodable.length > 0);
  }
  const { seed, stop, ...numbers } = Object.fromEntries(new FormData(form));
  const unknown = charset.unknown(charset.read(unescaped(stop)));
  if (unknown.length) {
    const isTrue = () => form.elements.stop.value === stop && active?.branch.model === branch.model;
    return showMessage(`Change the text to stop before: ${id} doesn't know ${describeAll(unknown)}, and never writes it.`, isTrue);
  }
  player.pause();
  column.moveTo(null);
  const settings = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, Number(value)]));
  if (seed !== "") settings.seed = Number(seed);
  if (stop !== "") settings.stop = unescaped(stop);
  await branch.generate(settings);
}

const ESCAPES = { n: "\n", t: "\t", "\\": "\\" };

/** The text that is meant by one that was entered in a single line, where \n is a new line. */
const unescaped = (text) => text.replace(/\\([nt\\])/g, (_, char) => ESCAPES[char]);

async function openState(file) {
  const { state, text } = await read(file);
  const branch = await Branch.create(api, models, file.name, { state });
  branch.past = text;
  addColumn(branch).focus();
}

async function saveState() {
  const { branch } = active;
  download(await branch.portableState(), branch.past + branch.chars.join(""));
}

// Controls

/** Show the server's models and limits. */
function showModels() {
  const { ids, limits } = models;
  const offered = [...new Set([...ids, ...columns.map(({ branch }) => branch.model.id)])];
  const menu = byId("model");
  if (offered.join("\n") !== Array.from(menu.options, ({ value }) => value).join("\n")) {
    menu.replaceChildren(...offered.map((id) => new Option(id, id)));
  }
  const field = byId("settings").elements.max_tokens;
  field.max = limits.session_max_tokens;
  if (Number(field.defaultValue) > limits.session_max_tokens) field.defaultValue = limits.session_max_tokens;
  setText(byId("max-tokens"), `(at most ${limits.session_max_tokens.toLocaleString("en")})`);
  redraw();
}

function addListeners() {
  byId("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    reportingErrors(generateOrStop)(event.target);
  });
  models.addEventListener("list", showModels);
  models.follow();
  byId("model").addEventListener("change", ({ target }) => reportingErrors(useModel)(target.value));
  byId("save").addEventListener("click", reportingErrors(saveState));
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (file) reportingErrors(openState)(file);
    target.value = "";
  });
  byId("new").addEventListener("click", reportingErrors(addNewText));
  byId("back").addEventListener("click", () => active.step(-1));
  byId("forward").addEventListener("click", () => active.step(1));
  byId("last").addEventListener("click", () => active.moveTo(null));
  byId("play").addEventListener("click", () => (player.isPlaying ? player.pause() : play()));
  player.addEventListener("change", () => setText(byId("play"), player.isPlaying ? "Pause" : "Play"));
  byId("speed").addEventListener("input", ({ target }) => {
    player.speed = Number(target.value);
    byId("speed-value").textContent = target.value;
  });
  network.addEventListener("unit", ({ detail }) => chooseUnit(detail));
  network.addEventListener("layer", ({ detail }) => {
    network.layer = detail;
    scheduleRanking();
    recolour();
  });
  network.addEventListener("model", () => {
    byId("ranking").querySelector("tbody").replaceChildren(); // the units of another model
    scheduleRanking();
    recolour();
  });
  byId("unit").addEventListener("input", ({ target }) => chooseUnit(target.value !== "" && target.validity.valid ? Number(target.value) : null));
  byId("colouring").addEventListener("change", recolour);
  byId("ranking").addEventListener("toggle", scheduleRanking);
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.target.matches("input, textarea, select") && !event.altKey && !event.metaKey) active.step(by);
  });
}

/** Play from the cursor, or from the beginning of the text if the cursor is at its end. */
function play() {
  if (active.cursor === null || active.cursor === active.branch.chars.length - 1) active.moveTo(0);
  player.play();
}

/** Show the texts that the tab had before a reload, or a new text. */
async function start() {
  const stored = TabStorage.read();
  await models.load();
  for (const snapshot of stored?.branches ?? []) {
    await reportingErrors(async () => {
      const branch = await Branch.restore(api, models, snapshot).catch((error) => {
        unrestored.push(snapshot);
        throw error;
      });
      addColumn(branch).restore(snapshot);
    })();
  }
  if (!columns.length) addColumn(await createText());
  activate(columns[stored?.active] ?? columns[0]);
  addListeners();
  showModels();
  active.focus();
  document.body.classList.add("ready");
}

start().catch((error) => showMessage(`${error.message} Reload the page to try again.`, () => true, Infinity));
byId("not-loaded").remove(); // this program and all parts of it have been loaded
