// Buttons below a text with the likeliest words to follow it, through POST /v1/sessions/{id}/suggest, while the user types.

const NUM_SUGGESTIONS = 5;
const DELAY_MS = 200; // after the last change of the text
const OF_WORD = /[\p{L}\p{M}'’]/u;

/** Shows suggestions for a column that has the focus. A click types one into it, with a space after it. */
export class Suggestions {
  #api;
  #column;
  #list;
  #shown = null; // {model, end, tail}: the text that the buttons belong to; null if they belong to none
  #timer = null;
  #abort = new AbortController(); // of the request that is under way

  constructor(api, column) {
    this.#api = api;
    this.#column = column;
    this.#list = column.element.querySelector(".suggestions");
    this.#list.setAttribute("aria-label", `Likely words to follow: ${column.branch.name}`);
    for (const kind of ["text", "synced", "run"]) column.branch.addEventListener(kind, () => this.#schedule());
    column.element.addEventListener("focusin", () => this.#schedule());
  }

  /** Whether the server has the whole text, and the user types into it. */
  get #isWanted() {
    const { branch, element, unencodable } = this.#column;
    const isSent = branch.serverEnd === branch.end && branch.rewindTo === null && unencodable.length === 0;
    return isSent && !branch.isRunning && branch.end > 0 && element.contains(document.activeElement);
  }

  #schedule() {
    const { branch } = this.#column;
    if (this.#isShownAt(branch)) return;
    this.#shown = null;
    clearTimeout(this.#timer);
    this.#abort.abort();
    for (const button of this.#list.children) button.disabled = true; // they belong to another text
    if (branch.isRunning || branch.end === 0) this.#list.replaceChildren();
    this.#timer = setTimeout(() => this.#update(), DELAY_MS);
  }

  #isShownAt({ model, end, chars }) {
    return this.#shown?.model === model && this.#shown.end === end && this.#shown.tail === tailOf(chars);
  }

  async #update() {
    const { branch } = this.#column;
    if (!this.#isWanted) return;
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    const { model, end, chars } = branch;
    try {
      const answer = await this.#api.call("POST", `${branch.path}/suggest`, { n: NUM_SUGGESTIONS }, signal);
      if (signal.aborted || answer.position !== branch.end) return;
      this.#shown = { model, end, tail: tailOf(chars) };
      const isRest = OF_WORD.test(chars.at(-1)); // suggestions are then the rest of a word
      this.#list.replaceChildren(...answer.data.map((suggestion) => this.#button(suggestion, isRest ? "…" : "")));
    } catch {
      this.#list.replaceChildren(); // what the user does next shows the error, if it lasts
    }
  }

  #button({ text, logprob }, before) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = before + text.replaceAll("\n", "⏎").trim();
    button.title = `Probability ${(100 * Math.exp(logprob)).toPrecision(2)} %`;
    button.setAttribute("aria-label", `Type: ${text.trim()}`);
    button.addEventListener("click", () => this.#type(text));
    return button;
  }

  #type(text) {
    const column = this.#column;
    if (!this.#isShownAt(column.branch)) return;
    column.type(column.branch.model.charset.has(" ") ? `${text} ` : text);
    column.focus();
  }

  remove() {
    clearTimeout(this.#timer);
    this.#abort.abort();
  }
}

/** The end of a text, which tells it from another one of the same length. */
const tailOf = (chars) => chars.slice(-32).join("");
