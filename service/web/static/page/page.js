// Entry point of the page: connects the columns of text, the drawing of the network, and the controls.

import { Api } from "./api.js";
import { Branch } from "./branch.js";
import { describe } from "./charset.js";
import { Column } from "./column.js";
import { download, read } from "./files.js";
import { Inspector } from "./inspector.js";
import { Models } from "./models.js";
import { Network } from "./network.js";
import { float16Value, formatNumber } from "./numbers.js";
import { Player } from "./player.js";
import { rankUnits } from "./ranking.js";
import { TabStorage } from "./tabstorage.js";

const byId = (id) => document.getElementById(id);
const MAX_SURPRISE = 6; // nats that get the last colour
const MESSAGE_MS = 10_000;
const RANKING_DELAY_MS = 400;

const columns = [];
let active = null; // the column that the controls act on

// Messages to the user

let [problem, message, messageTimer] = [null, null, null];

function showStatus() {
  byId("trouble").textContent = problem ?? message ?? "";
}

/** Show a message for a while. A problem with the server, as long as it lasts, is shown instead. */
function showMessage(text) {
  message = text;
  clearTimeout(messageTimer);
  messageTimer = setTimeout(() => showMessage(null), MESSAGE_MS);
  showStatus();
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
const storage = new TabStorage(() => ({ active: columns.indexOf(active), branches: columns.map(({ branch }) => branch.snapshot) }));

/** Wrap an async event handler so that its errors are shown to the user. */
const reportingErrors = (handler) => (...args) => handler(...args).catch((error) => showMessage(error.message));

// Drawing, at most once per frame

let isRedrawScheduled = false;

function redraw() {
  if (isRedrawScheduled) return;
  isRedrawScheduled = true;
  requestAnimationFrame(() => {
    isRedrawScheduled = false;
    for (const column of columns) column.render(column === active, colouring(column));
    if (active) drawActive();
    storage.scheduleWrite();
  });
}

function drawActive() {
  const { branch, inspector, cursorIndex } = active;
  const { chars } = branch;
  network.setModel(branch.model);
  byId("model").value = branch.model.id;
  const hasCharacter = cursorIndex >= 0 && cursorIndex < chars.length;
  network.show(hasCharacter ? { char: chars[cursorIndex], following: chars[cursorIndex + 1], ...inspector.get(cursorIndex) } : null);
  setText(byId("go"), branch.isRunning ? "Stop" : "Continue");
  byId("last").disabled = active.cursor === null;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Colouring

const chosenColouring = () => document.querySelector("#colouring input:checked").value;

/** Return the function that maps an index of a column's text to a value from -1 to 1, or null if it gets no colours. */
function colouring({ inspector, branch }) {
  const kind = chosenColouring();
  if (kind === "surprise") return (i) => Math.min(1, inspector.surprises[i] / MAX_SURPRISE);
  if (kind === "none" || network.unit === null) return null;
  if (network.unit >= branch.model.units || network.layer >= branch.model.layers) return null;
  const offset = network.layer * branch.model.units + network.unit;
  return (i) => (inspector.states[i] ? float16Value(inspector.states[i][offset]) : NaN);
}

function recolour() {
  for (const column of columns) column.unpaint();
  byId("legend").className = chosenColouring();
  redraw();
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
  if (previous) previous.element.after(column.element);
  else byId("columns").append(column.element);
  columns.splice(columns.indexOf(previous) + 1, 0, column);
  for (const source of [branch, inspector]) source.addEventListener("message", ({ detail }) => showMessage(detail));
  for (const kind of ["run", "synced"]) branch.addEventListener(kind, redraw);
  inspector.addEventListener("read", () => {
    redraw();
    if (column === active) scheduleRanking();
  });
  column.addEventListener("change", redraw);
  column.addEventListener("activate", () => activate(column));
  column.addEventListener("fork", reportingErrors(async ({ detail }) => fork(column, detail)));
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

/** Remove a column and delete its session. There is always at least one column. */
async function closeColumn(column) {
  if (columns.length === 1) addColumn(await createText(column.branch.model.id));
  columns.splice(columns.indexOf(column), 1);
  column.remove();
  if (active === column) activate(columns[0]);
  redraw();
  await column.branch.delete();
}

/** Let another model read the active text. An empty text is replaced by one of that model. */
async function useModel(id) {
  const { branch } = active;
  const column = active;
  try {
    if (branch.end > 0) return await branch.rebase(await models.get(id));
    addColumn(await Branch.create(api, models, branch.name, { model: id }), column);
    await closeColumn(column);
  } finally {
    redraw(); // if the server refused, the menu shows the old model again
  }
}

async function generateOrStop(form) {
  const { branch, unencodable } = active;
  if (branch.isRunning) return branch.stop();
  if (unencodable.length) return showMessage(`Delete ${describe(unencodable[0])} first: the model doesn't know it.`);
  player.pause();
  active.moveTo(null);
  const { seed, ...numbers } = Object.fromEntries(new FormData(form));
  const settings = Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, Number(value)]));
  if (seed !== "") settings.seed = Number(seed);
  await branch.generate(settings);
}

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

function addListeners() {
  byId("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    reportingErrors(generateOrStop)(event.target);
  });
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
  byId("model").replaceChildren(...(await models.list()).map((id) => new Option(id, id)));
  for (const snapshot of stored?.branches ?? []) {
    await reportingErrors(async () => addColumn(await Branch.restore(api, await models.get(snapshot.model), snapshot)))();
  }
  if (!columns.length) addColumn(await createText());
  activate(columns[stored?.active] ?? columns[0]);
  addListeners();
  active.focus();
  document.body.classList.add("ready");
}

reportingErrors(start)();
