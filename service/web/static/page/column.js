// One branch on the page: its text, what is typed into it, and the place that is looked at.

import { named } from "./charset.js";
import { TextView } from "./textview.js";

// Any change of any highlight makes the browser paint all of them anew. A text that grows by itself may lag by so much.
const HIGHLIGHT_MS = 100;
const MOVES = { ArrowLeft: -1, ArrowRight: 1 };

/** Dispatches `active`, `close`, `fork` (detail: how many characters it gets), `look`. */
export class Column extends EventTarget {
  cursor = null; // index of the character that is looked at; null: the last one that was read
  rest = []; // what was typed and can't be sent: it begins with a character that the model doesn't know
  #parts;
  #view;
  #dirty = 0; // the first index that is to be shown anew; Infinity: none
  #isComposing = false;
  #highlightedAt = -Infinity; // performance.now()
  #later = null; // a timer, if there is something to be highlighted

  constructor(template, branch, watch) {
    super();
    [this.branch, this.watch] = [branch, watch];
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.#parts = {
      name: find("h3"), text: find(".text"), unknown: find(".unknown"), place: find(".place p"),
      rewind: find(".rewind"), fork: find(".fork"), close: find(".close"),
      rest: document.createElement("mark"), typing: document.createElement("textarea"),
    };
    this.#buildText();
    this.#parts.rewind.addEventListener("click", () => this.rewind(this.#shown + 1));
    this.#parts.fork.addEventListener("click", () => this.#tell("fork", this.#shown + 1));
    this.#parts.close.addEventListener("click", () => this.#tell("close"));
    this.element.addEventListener("focusin", () => this.#tell("active"));
    branch.addEventListener("text", ({ detail }) => this.#textChanged(detail));
  }

  #buildText() {
    const { text, typing, rest, name, close } = this.#parts;
    name.textContent = this.branch.name;
    close.setAttribute("aria-label", `Forget: ${this.branch.name}`);
    const past = text.appendChild(document.createElement("div"));
    past.className = "past";
    past.textContent = this.branch.past;
    Object.assign(typing, { rows: 1, spellcheck: false, autocapitalize: "off", autocomplete: "off", placeholder: "Type here" });
    typing.setAttribute("aria-label", `Add to: ${this.branch.name}`);
    this.#view = new TextView(text, [rest, typing]);
    typing.addEventListener("compositionstart", () => (this.#isComposing = true));
    typing.addEventListener("compositionend", () => {
      this.#isComposing = false;
      this.#takeTyped();
    });
    typing.addEventListener("input", () => this.#takeTyped());
    typing.addEventListener("keydown", (event) => this.#pressed(event));
    text.addEventListener("click", (event) => this.#clicked(event));
  }

  #tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  focus() {
    this.#parts.typing.focus({ preventScroll: true });
  }

  #textChanged(from) {
    this.#dirty = Math.min(this.#dirty, from);
    if (this.cursor !== null && this.cursor >= this.branch.chars.length) this.cursor = null;
    this.#tell("look");
  }

  #takeTyped() {
    const { typing } = this.#parts;
    if (this.#isComposing || !typing.value) return;
    const text = this.rest.join("") + typing.value;
    typing.value = "";
    this.type(text);
  }

  /** Add a text to the end. What the model doesn't know is shown and not sent, nor is anything behind it. */
  type(text) {
    const { known, rest } = this.branch.model.charset.split(text);
    this.rest = rest;
    this.cursor = null;
    if (known.length) this.branch.append(known.join(""));
    this.#tell("look");
  }

  #pressed(event) {
    if (this.#isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    const { typing } = this.#parts;
    if (typing.value) return;
    if (event.key === "Backspace") this.#eraseOne();
    else if (event.key in MOVES) this.step(MOVES[event.key]);
    else if (event.key === "Home") this.look(0);
    else if (event.key === "End" || event.key === "Escape") this.look(null);
    else return;
    event.preventDefault();
  }

  #eraseOne() {
    if (this.rest.length) {
      this.rest.pop();
      this.#tell("look");
    } else if (this.branch.chars.length) {
      this.rewind(this.branch.chars.length - 1);
    }
  }

  #clicked({ clientX, clientY }) {
    if (!getSelection().isCollapsed) return; // somebody marks text to copy it
    const index = this.#view.at(clientX, clientY);
    if (index !== null && index < this.branch.chars.length) this.look(index);
    this.focus();
  }

  /** Only so many characters are left. */
  rewind(length) {
    this.rest = [];
    this.cursor = null;
    this.branch.rewind(this.branch.first + length);
    this.#tell("look");
    this.focus();
  }

  /** Look at a character; null: always at the last one. */
  look(index) {
    this.cursor = index;
    this.#tell("look");
  }

  /** To the next character, or one before. False: there is none. */
  step(by) {
    const next = this.#shown + by;
    if (next < 0 || next >= this.branch.chars.length) return false;
    this.look(next);
    return true;
  }

  /** The index that is looked at; -1: there is nothing. */
  get #shown() {
    return this.cursor ?? Math.min(this.watch.known, this.branch.chars.length) - 1;
  }

  get shown() {
    return this.#shown;
  }

  /** Bring the page to where the branch is. valueOf: index -> the number that colours its character, or null. */
  render(isActive, valueOf) {
    const { chars } = this.branch;
    if (this.#dirty < Infinity) this.#view.update(chars, this.#dirty);
    this.#dirty = Infinity;
    if (this.#mayHighlight()) {
      if (valueOf) this.#view.paint(valueOf, Math.min(this.watch.known, chars.length));
      if (isActive) this.#view.mark(this.#shown, this.cursor !== null);
    }
    this.#say();
  }

  /** False: it is too early, and will be drawn again in time. */
  #mayHighlight() {
    const wait = this.cursor === null ? this.#highlightedAt + HIGHLIGHT_MS - performance.now() : 0;
    if (wait > 0) {
      this.#later ??= setTimeout(() => {
        this.#later = null;
        this.#tell("look");
      }, wait);
      return false;
    }
    clearTimeout(this.#later);
    this.#later = null;
    this.#highlightedAt = performance.now();
    return true;
  }

  /** Take the colours off: they mean something else now. */
  unpaint() {
    this.#view.unpaint();
    this.#highlightedAt = -Infinity;
  }

  #say() {
    const { rest, unknown, place, rewind, fork, typing } = this.#parts;
    const { branch } = this;
    const [index, count] = [this.#shown, branch.chars.length];
    set(rest, this.rest.join(""));
    const [first] = this.rest;
    set(unknown, first ? `${branch.model.id} doesn't know ${named(first)}: it is not sent, nor what follows. Backspace removes it.` : "");
    const isEmpty = count === 0 && !branch.past;
    typing.classList.toggle("empty", isEmpty && !first);
    const at = index >= 0 ? `${named(branch.chars[index])}, ${branch.first + index + 1} of ${branch.end}` : "Nothing is read yet";
    set(place, `${at} · seed ${branch.seed}`);
    rewind.disabled = fork.disabled = index < 0;
    if (!rewind.disabled) rewind.disabled = index === count - 1;
  }

  remove() {
    clearTimeout(this.#later);
    this.#view.unpaint();
    if (this.element.classList.contains("active")) TextView.unmark();
    this.element.remove();
  }
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
