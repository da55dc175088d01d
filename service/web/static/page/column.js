// One branch on the screen: its text, the field to type into, the cursor, and the buttons of the column.

import { describe, describeAll } from "./charset.js";
import { TextView } from "./textview.js";

// Any change of a highlight makes the browser repaint all of them. While a text grows, they lag by at most this time.
const HIGHLIGHT_MS = 100;
const ARROW_STEPS = { ArrowLeft: -1, ArrowRight: 1 };

// What the buttons do with characters that the model doesn't know; the API's `unknown_chars`.
const [FOLD, DROP] = ["fold", "drop"];
const MARK = /[\p{M}\u1160-\u11FF]/u;

/** Whether a character may form one character, or one line end, with the one before it. */
const joins = (before, char) => (char === "\n" ? before === "\r" : MARK.test(char));

/** The index after a character and those that join with it, at most `limit` of them. They are sent in one request. */
function endOfUnit(chars, start, limit) {
  let end = Math.min(start + 1, chars.length);
  while (end < chars.length && end - start < limit && joins(chars[end - 1], chars[end])) end++;
  return end;
}

// For each model, the units that it has no similar character for, as the server has answered.
const unfoldable = new WeakMap();

/**
 * Dispatches `activate`, `close`, `fork` (detail: how many characters to copy), `copy` (detail: {model, unknownChars}; a copy
 * for another model), `message` (detail: a message for the user) and `change` (it needs rendering).
 */
export class Column extends EventTarget {
  cursor = null; // index of the character under the cursor; null: the cursor follows the last character read
  unencodable = []; // typed characters that can't be sent: from the first one that the model doesn't know
  chosenModel = null; // {id}: the model that is about to read this text; null if none
  suggestions = null; // the buttons below the text
  refusedModel = null; // the model that the user chose for this text but that doesn't know all of its characters
  #parts;
  #view;
  // {count, batch}: how many of `unencodable` are being sent with the user's choice, and in the current request; null if none
  #sending = null;
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
    if (this.#sending) {
      this.unencodable = this.unencodable.concat(Array.from(text));
    } else {
      const { known, rest } = this.branch.model.charset.split(this.unencodable.join("") + text);
      this.unencodable = rest;
      if (known.length) this.branch.append(known.join(""));
    }
    this.#emit("change");
  }

  /** What a reload of the page needs. The field names are a stored format. */
  get snapshot() {
    return { ...this.branch.snapshot, unsent: this.unencodable.join(""), sending: this.#sending?.batch ?? 0 };
  }

  /** Show the characters of a snapshot that were not sent. Those of a request that the server has carried out are in the text. */
  restore({ first, text, unsent = "", sending = 0 }) {
    const chars = Array.from(unsent);
    const isDone = sending > 0 && this.branch.end > first + Array.from(text).length;
    this.type(chars.slice(isDone ? sending : 0).join(""));
  }

  get #unfoldable() {
    const { model } = this.branch;
    if (!unfoldable.has(model)) unfoldable.set(model, new Set());
    return unfoldable.get(model);
  }

  /** The first unit of what was not sent. */
  get #firstUnsent() {
    return this.unencodable.slice(0, endOfUnit(this.unencodable, 0, this.branch.maxFeedChars));
  }

  /** Whether the text waits before a character that can only be left out or deleted. */
  get #isStuck() {
    return this.#unfoldable.has(this.#firstUnsent.join(""));
  }

  /** Do what the user chose for characters that a model doesn't know. */
  async #choose(unknownChars) {
    if (this.#isStuck) return this.sendUnknown(FOLD, true);
    if (this.unencodable.length) return this.sendUnknown(unknownChars);
    const model = this.refusedModel;
    this.refusedModel = null;
    this.#emit("change");
    if (model) this.#emit("copy", { model, unknownChars });
  }

  /**
   * Send the characters from the first unknown one on; the server replaces the unknown ones (fold) or leaves them out (drop).
   * Folding stops before a character for which the model has no similar one, unless `leavesOut` leaves such ones out.
   */
  async sendUnknown(unknownChars, leavesOut = false) {
    if (this.#sending) return;
    const sending = (this.#sending = { count: this.unencodable.length, batch: 0 });
    const isFolding = unknownChars === FOLD;
    let limit = this.branch.maxFeedChars;
    this.#emit("change");
    while (sending.count && this.#sending === sending) {
      const isStuck = isFolding && this.#isStuck;
      if (isStuck && !leavesOut) break;
      const batch = isStuck ? this.#firstUnsent : this.#nextBatch(sending.count, limit, isFolding);
      sending.batch = isStuck ? 0 : batch.length;
      if (!isStuck) {
        const isSent = await this.#appendAs(batch, unknownChars);
        if (this.#sending !== sending || isSent === null) break;
        if (!isSent) { // one of them has no similar character: smaller and smaller requests find which
          const isUnit = endOfUnit(batch, 0, batch.length) === batch.length;
          if (isUnit && !this.#isStuck) break; // a mark was typed after it meanwhile
          limit = Math.floor(batch.length / 2);
          continue;
        }
        limit = Math.min(2 * Math.max(1, limit), this.branch.maxFeedChars);
      }
      this.unencodable.splice(0, batch.length);
      sending.count -= Math.min(batch.length, sending.count);
    }
    if (this.#sending === sending) this.#endSending();
    this.#emit("change");
    if (this.unencodable.length === 0) this.focus();
  }

  /** Send characters. Returns true, false if a character has no similar one, or null if they can't be sent now. */
  async #appendAs(chars, unknownChars) {
    try {
      return (await this.branch.appendAs(chars, unknownChars)) || null;
    } catch (error) {
      if (error.code === "unknown_characters" && unknownChars === FOLD) {
        if (endOfUnit(chars, 0, chars.length) === chars.length) this.#unfoldable.add(chars.join(""));
        return false;
      }
      this.#emit("message", error.message);
      return null;
    }
  }

  /**
   * The next characters to send in one request: whole units of the first `count`, at most `limit` characters if the first unit
   * is not longer. Without what is known to have no similar character.
   */
  #nextBatch(count, limit, isFolding) {
    const chars = this.unencodable.slice(0, count);
    let end = 0;
    while (end < chars.length) {
      const next = endOfUnit(chars, end, this.branch.maxFeedChars);
      if (end > 0 && (next > limit || (isFolding && this.#unfoldable.has(chars.slice(end, next).join(""))))) break;
      end = next;
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
    if (this.#isStuck) {
      const names = describeAll(this.#firstUnsent);
      setText(warning, `${branch.model.id} has no similar character for ${names}. From there on, nothing is sent. Backspace deletes.`);
      fold.hidden = true;
      setText(drop, "Leave out what has none");
    } else if (isTyped) {
      const names = describeAll(branch.model.charset.unknown(unencodable));
      setText(warning, `${branch.model.id} doesn't know ${names}. From the first one on, nothing is sent. Backspace deletes.`);
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
