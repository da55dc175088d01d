// One branch on the screen: its text, the field to type into, the cursor, and the buttons of the column.

import { describe } from "./charset.js";
import { TextView } from "./textview.js";

// Any change of a highlight makes the browser repaint all of them. While a text grows, they lag by at most this time.
const HIGHLIGHT_MS = 100;
const ARROW_STEPS = { ArrowLeft: -1, ArrowRight: 1 };

/** Dispatches `activate`, `close`, `fork` (detail: how many characters to copy) and `change` (it needs rendering). */
export class Column extends EventTarget {
  cursor = null; // index of the character under the cursor; null: the cursor follows the last character read
  unencodable = []; // typed characters that can't be sent: from the first one that the model doesn't know
  #parts;
  #view;
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
      name: find("h3"), text: find(".text"), warning: find(".unknown"), place: find(".place p"),
      rewind: find(".rewind"), fork: find(".fork"), close: find(".close"),
      unencodable: document.createElement("mark"), field: document.createElement("textarea"),
    };
    this.#buildText();
    this.#parts.rewind.addEventListener("click", () => this.rewind(this.cursorIndex + 1));
    this.#parts.fork.addEventListener("click", () => this.#emit("fork", this.cursorIndex + 1));
    this.#parts.close.addEventListener("click", () => this.#emit("close"));
    this.element.addEventListener("focusin", () => this.#emit("activate"));
    branch.addEventListener("text", ({ detail }) => this.#onTextChange(detail));
  }

  #buildText() {
    const { text, field, unencodable, name, close } = this.#parts;
    name.textContent = this.branch.name;
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
    this.#dirtyFrom = Math.min(this.#dirtyFrom, from);
    if (this.cursor !== null && this.cursor >= this.branch.chars.length) this.cursor = null;
    this.#emit("change");
  }

  #readField() {
    const { field } = this.#parts;
    if (this.#isComposing || !field.value) return;
    const text = this.unencodable.join("") + field.value;
    field.value = "";
    this.type(text);
  }

  /** Append a text. From the first character on that the model doesn't know, it is shown but not sent. */
  type(text) {
    const { known, rest } = this.branch.model.charset.split(text);
    this.unencodable = rest;
    this.cursor = null;
    if (known.length) this.branch.append(known.join(""));
    this.#emit("change");
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
      this.unencodable.pop();
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
    const { unencodable, warning, place, rewind, fork, field } = this.#parts;
    const { branch } = this;
    const [index, count] = [this.cursorIndex, branch.chars.length];
    setText(unencodable, this.unencodable.join(""));
    const [first] = this.unencodable;
    setText(warning, first ? `${branch.model.id} doesn't know ${describe(first)}. From this character on, nothing is sent. Press Backspace to delete it.` : "");
    const isEmpty = count === 0 && !branch.past;
    field.classList.toggle("empty", isEmpty && !first);
    const where = index >= 0 ? `${describe(branch.chars[index])}, ${branch.start + index + 1} of ${branch.end}` : "No character read yet";
    setText(place, `${where} · seed ${branch.seed}`);
    rewind.disabled = fork.disabled = index < 0;
    if (!rewind.disabled) rewind.disabled = index === count - 1;
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
