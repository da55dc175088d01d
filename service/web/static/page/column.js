// One branch on the screen: its text, the field to type into, the cursor, and the buttons of the column.

import { describe, describeAll } from "./charset.js";
import { TextView } from "./textview.js";

// Any change of a highlight makes the browser repaint all of them. While a text grows, they lag by at most this time.
const HIGHLIGHT_MS = 100;
const ARROW_STEPS = { ArrowLeft: -1, ArrowRight: 1 };

// What the buttons do with characters that the model doesn't know; the API's `unknown_chars`.
const [FOLD, DROP] = ["fold", "drop"];
const JOINS_BEFORE = /[\p{M}\u1160-\u11FF\n]/u; // what may form one character, or one line end, with what is before it

/**
 * Dispatches `activate`, `close`, `fork` (detail: how many characters to copy), `copy` (detail: {model, unknownChars}; a copy
 * for another model), `message` (detail: a message for the user) and `change` (it needs rendering).
 */
export class Column extends EventTarget {
  cursor = null; // index of the character under the cursor; null: the cursor follows the last character read
  unencodable = []; // typed characters that can't be sent: from the first one that the model doesn't know
  chosenModel = null; // {id}: the model that is about to read this text; null if none
  refusedModel = null; // the model that the user chose for this text but that doesn't know all of its characters
  #parts;
  #view;
  #sending = null; // {count}: how many of `unencodable` are being sent with the user's choice; null if none
  #canFold = true; // false if the server knows no similar characters for those that are typed
  #dirtyFrom = 0; // first index that needs rendering; Infinity if none
  #isComposing = false;
  #highlightedAt = -Infinity; // performance.now()
  #highlightTimer = null;

  constructor(template, branch, inspector) {
    super();
    this.branch = branch;
    this.inspector = inspector;
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.#parts = {
      name: find("h3"), model: find(".model"), text: find(".text"), place: find(".place p"),
      warning: find(".unknown p"), fold: find(".unknown .fold"), drop: find(".unknown .drop"),
      rewind: find(".rewind"), fork: find(".fork"), close: find(".close"),
      unencodable: document.createElement("mark"), field: document.createElement("textarea"),
    };
    this.#buildText();
    for (const choice of [FOLD, DROP]) this.#parts[choice].addEventListener("click", () => this.#choose(choice));
    this.#parts.rewind.addEventListener("click", () => this.rewind(this.cursorIndex + 1));
    this.#parts.fork.addEventListener("click", () => this.#emit("fork", this.cursorIndex + 1));
    this.#parts.close.addEventListener("click", () => this.#emit("close"));
    this.element.addEventListener("focusin", () => this.#emit("activate"));
    branch.addEventListener("text", ({ detail }) => this.#onTextChange(detail));
  }

  #buildText() {
    const { text, field, unencodable, name, close } = this.#parts;
    name.textContent = name.title = this.branch.name;
    close.setAttribute("aria-label", `Delete: ${this.branch.name}`);
    const past = text.appendChild(document.createElement("div"));
    past.className = "past";
    past.textContent = this.branch.past;
    Object.assign(field, { rows: 1, spellcheck: false, autocapitalize: "off", autocomplete: "off", placeholder: "Type here" });
    field.setAttribute("aria-label", `Type into: ${this.branch.name}`);
    this.#view = new TextView(text, [unencodable, field]);
    field.addEventListener("compositionstart", () => (this.#isComposing = true));
    field.addEventListener("compositionend", () => {
      this.#isComposing = false;
      this.#readField();
    });
    field.addEventListener("input", () => this.#readField());
    field.addEventListener("keydown", (event) => this.#onKey(event));
    text.addEventListener("click", (event) => this.#onClick(event));
  }

  #emit(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  focus() {
    this.#parts.field.focus({ preventScroll: true });
  }

  #onTextChange(from) {
    this.refusedModel = null;
    this.#dirtyFrom = Math.min(this.#dirtyFrom, from);
    if (this.cursor !== null && this.cursor >= this.branch.chars.length) this.cursor = null;
    this.#emit("change");
  }

  #readField() {
    const { field } = this.#parts;
    if (this.#isComposing || !field.value) return;
    const text = field.value;
    field.value = "";
    this.type(text);
  }

  /** Append a text. From the first character on that the model doesn't know, it is shown but not sent. */
  type(text) {
    this.cursor = null;
    this.refusedModel = null;
    this.#canFold = true;
    if (this.#sending) {
      this.unencodable = this.unencodable.concat(Array.from(text));
    } else {
      const { known, rest } = this.branch.model.charset.split(this.unencodable.join("") + text);
      this.unencodable = rest;
      if (known.length) this.branch.append(known.join(""));
    }
    this.#emit("change");
  }

  /** Do what the user chose for characters that a model doesn't know. */
  async #choose(unknownChars) {
    if (this.unencodable.length) return this.sendUnknown(unknownChars);
    const model = this.refusedModel;
    this.refusedModel = null;
    this.#emit("change");
    if (model) this.#emit("copy", { model, unknownChars });
  }

  /** Send the characters from the first unknown one on; the server replaces the unknown ones (fold) or leaves them out (drop). */
  async sendUnknown(unknownChars) {
    if (this.#sending) return;
    const sending = (this.#sending = { count: this.unencodable.length });
    this.#emit("change");
    try {
      while (sending.count && this.#sending === sending) {
        const batch = this.#nextBatch(sending.count);
        if (!(await this.branch.appendAs(batch, unknownChars)) || this.#sending !== sending) break;
        this.unencodable.splice(0, batch.length);
        sending.count -= batch.length;
      }
      if (this.#sending === sending) this.#endSending();
    } catch (error) {
      if (this.#sending === sending) this.#endSending();
      this.#canFold = false;
      if (unknownChars !== FOLD) this.#emit("message", error.message);
    }
    this.#emit("change");
    if (this.unencodable.length === 0) this.focus();
  }

  /** The next characters to send in one request: they end where the next character can't join with the last one. */
  #nextBatch(count) {
    const chars = this.unencodable;
    let end = Math.min(count, this.branch.maxFeedChars);
    for (let at = end; at > end / 2; at--) {
      if (at === count || !JOINS_BEFORE.test(chars[at])) return chars.slice(0, at);
    }
    return chars.slice(0, end);
  }

  /** Read again what was typed meanwhile, which may have known characters only. */
  #endSending() {
    this.#sending = null;
    this.type("");
  }

  #onKey(event) {
    if (this.#isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (this.#parts.field.value) return;
    if (event.key === "Backspace") this.#eraseLast();
    else if (event.key in ARROW_STEPS) this.step(ARROW_STEPS[event.key]);
    else if (event.key === "Home") this.moveTo(0);
    else if (event.key === "End" || event.key === "Escape") this.moveTo(null);
    else return;
    event.preventDefault();
  }

  #eraseLast() {
    if (this.unencodable.length) {
      if (this.unencodable.length <= (this.#sending?.count ?? 0)) return; // the server reads them already
      this.unencodable.pop();
      this.#canFold = true;
      this.#emit("change");
    } else if (this.branch.chars.length) {
      this.rewind(this.branch.chars.length - 1);
    }
  }

  #onClick({ clientX, clientY }) {
    if (!getSelection().isCollapsed) return; // the user selects text to copy it
    const index = this.#view.indexAt(clientX, clientY);
    if (index !== null && index < this.branch.chars.length) this.moveTo(index);
    this.focus();
  }

  /** Keep the first `length` characters and remove the others. */
  rewind(length) {
    this.unencodable = [];
    this.#sending = null;
    this.cursor = null;
    this.branch.rewind(this.branch.start + length);
    this.#emit("change");
    this.focus();
  }

  /** Move the cursor to a character; null: to the end, which it then follows. */
  moveTo(index) {
    this.cursor = index;
    this.#emit("change");
  }

  /** Move the cursor by some characters. Returns false if there is no character there. */
  step(by) {
    const next = this.cursorIndex + by;
    if (next < 0 || next >= this.branch.chars.length) return false;
    this.moveTo(next);
    return true;
  }

  /** Index of the character under the cursor, also where the cursor follows the end; -1 if there is none. */
  get cursorIndex() {
    return this.cursor ?? Math.min(this.inspector.numRead, this.branch.chars.length) - 1;
  }

  /** Show the current state of the branch. valueAt: index -> the value that colours a character; null for no colours. */
  render(isActive, valueAt) {
    const { chars } = this.branch;
    if (this.#dirtyFrom < Infinity) this.#view.update(chars, this.#dirtyFrom);
    this.#dirtyFrom = Infinity;
    if (this.#mayHighlight()) {
      if (valueAt) this.#view.paint(valueAt, Math.min(this.inspector.numRead, chars.length));
      if (isActive) this.#view.markCursor(this.cursorIndex, this.cursor !== null);
    }
    this.#renderStatus();
  }

  /** Whether highlights may change now. If it is too early, a timer asks for another rendering. */
  #mayHighlight() {
    const wait = this.cursor === null ? this.#highlightedAt + HIGHLIGHT_MS - performance.now() : 0;
    if (wait > 0) {
      this.#highlightTimer ??= setTimeout(() => {
        this.#highlightTimer = null;
        this.#emit("change");
      }, wait);
      return false;
    }
    clearTimeout(this.#highlightTimer);
    this.#highlightTimer = null;
    this.#highlightedAt = performance.now();
    return true;
  }

  /** Remove the colours, because their meaning has changed. */
  unpaint() {
    this.#view.unpaint();
    this.#highlightedAt = -Infinity;
  }

  #renderStatus() {
    const { unencodable, place, rewind, fork, field, model } = this.#parts;
    const { branch } = this;
    setText(model, `Model ${branch.model.id}`);
    model.title = branch.model.id;
    const [index, count] = [this.cursorIndex, branch.chars.length];
    setText(unencodable, this.unencodable.join(""));
    this.#renderOffer();
    const isEmpty = count === 0 && !branch.past;
    field.classList.toggle("empty", isEmpty && !this.unencodable.length);
    const where = index >= 0 ? `${describe(branch.chars[index])}, ${branch.start + index + 1} of ${branch.end}` : "No character read yet";
    const { seed, runSeed } = branch;
    setText(place, `${where} · ${runSeed === null ? "seed" : "seed used"}: ${runSeed ?? seed}`);
    rewind.disabled = fork.disabled = index < 0;
    if (!rewind.disabled) rewind.disabled = index === count - 1;
  }

  /** Name the characters that a model doesn't know, and offer to replace them or to leave them out. */
  #renderOffer() {
    const { warning, fold, drop } = this.#parts;
    const { branch, refusedModel, unencodable } = this;
    const isTyped = unencodable.length > 0;
    fold.hidden = drop.hidden = !isTyped && !refusedModel;
    fold.disabled = drop.disabled = this.#sending !== null;
    if (isTyped) {
      const names = describeAll(branch.model.charset.unknown(unencodable));
      const similar = this.#canFold ? "" : " It knows no similar characters for all of them.";
      setText(warning, `${branch.model.id} doesn't know ${names}.${similar} From the first one on, nothing is sent. Backspace deletes.`);
      fold.hidden = !this.#canFold;
      setText(fold, "Use similar characters");
      setText(drop, "Leave them out");
    } else if (refusedModel) {
      const names = describeAll(refusedModel.charset.unknown(branch.chars));
      setText(warning, `${refusedModel.id} doesn't know ${names}, which this text has. Only a changed copy can be read by it.`);
      setText(fold, "Copy with similar characters");
      setText(drop, "Copy without them");
    } else {
      setText(warning, "");
    }
  }

  remove() {
    clearTimeout(this.#highlightTimer);
    this.#view.unpaint();
    if (this.element.classList.contains("active")) TextView.clearCursor();
    this.element.remove();
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
