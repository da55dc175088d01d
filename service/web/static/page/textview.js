// Shows a growing text with its colours and cursor. Every line is an element, so appended text lays out only the last line
// again. Colours and cursor are CSS custom highlights, which change neither elements nor layout.

const NUM_LEVELS = 17; // of colours, from -1 to 1

const highlight = (name) => {
  const created = new Highlight();
  CSS.highlights.set(name, created);
  return created;
};
const levels = Array.from({ length: NUM_LEVELS }, (_, level) => highlight(`level-${level}`));
const cursor = highlight("cursor");
cursor.priority = 1;

/** The colour level of a value from -1 to 1; null, which is no colour, for NaN. */
const levelOf = (value) =>
  Number.isNaN(value) ? null : Math.round(((Math.max(-1, Math.min(1, value)) + 1) / 2) * (NUM_LEVELS - 1));

/** Fills an element with text, which is never parsed as markup. Indices count the code points of the whole text. */
export class TextView {
  #root;
  #tail; // the element of the last line: its text, then the trailing elements
  #lines; // {start, count, node}: index of the first character, number of characters, text node
  #painted = []; // {from, to, level, range} in the order of the text
  #paintedTo = 0; // characters before this index have their colours

  /** trailing: elements that follow the last line's text, such as the field to type into. */
  constructor(root, trailing) {
    this.#root = root;
    this.#tail = root.appendChild(document.createElement("div"));
    this.#tail.append(...trailing);
    this.#lines = [this.#newLine(0)];
  }

  get #length() {
    const last = this.#lines.at(-1);
    return last.start + last.count;
  }

  /** Show the text `chars`, which has changed from the index `from` on. Scrolls along if the end was visible. */
  update(chars, from) {
    const isAtEnd = this.#root.scrollHeight - this.#root.scrollTop - this.#root.clientHeight < 60;
    this.#truncate(Math.min(from, this.#length));
    for (let at = this.#length; at < chars.length; ) {
      const newline = chars.indexOf("\n", at);
      const end = newline < 0 ? chars.length : newline + 1;
      const line = this.#lines.at(-1);
      line.node.appendData(chars.slice(at, end).join(""));
      line.count += end - at;
      at = end;
      if (newline >= 0) this.#finishLine(line);
    }
    if (isAtEnd) this.#root.scrollTop = this.#root.scrollHeight;
  }

  #newLine(start) {
    const node = document.createTextNode("");
    this.#tail.prepend(node);
    return { start, count: 0, node };
  }

  /** Give a line that ends with a newline its own element. Its text node moves there, and its highlights with it. */
  #finishLine(line) {
    const element = document.createElement("div");
    element.append(line.node);
    this.#tail.before(element);
    this.#lines.push(this.#newLine(line.start + line.count));
  }

  #truncate(length) {
    if (length === this.#length) return;
    this.#unpaintFrom(length);
    while (this.#lines.at(-1).start > length) {
      this.#lines.pop().node.remove();
      const { node } = this.#lines.at(-1);
      const element = node.parentNode;
      this.#tail.prepend(node);
      element.remove();
    }
    const line = this.#lines.at(-1);
    line.node.data = Array.from(line.node.data).slice(0, length - line.start).join("");
    line.count = length - line.start;
  }

  /** Colour the characters before `end` that have no colour yet. valueAt: index -> a value from -1 to 1, or NaN. */
  paint(valueAt, end) {
    for (let at = this.#paintedTo; at < end; ) {
      const line = this.#lineOf(at);
      const last = Math.min(end, line.start + line.count);
      const level = levelOf(valueAt(at));
      let next = at + 1;
      while (next < last && levelOf(valueAt(next)) === level) next++;
      if (level !== null) {
        const range = this.#staticRange(line, at, next);
        levels[level].add(range);
        this.#painted.push({ from: at, to: next, level, range });
      }
      at = next;
    }
    this.#paintedTo = Math.max(this.#paintedTo, end);
  }

  unpaint() {
    this.#unpaintFrom(0);
  }

  #unpaintFrom(index) {
    this.#paintedTo = Math.min(this.#paintedTo, index);
    while (this.#painted.length && this.#painted.at(-1).to > index) {
      const { from, level, range } = this.#painted.pop();
      levels[level].delete(range);
      this.#paintedTo = Math.min(this.#paintedTo, from);
    }
  }

  /** Show the cursor on a character. follow: scroll the character into view. */
  markCursor(index, follow) {
    cursor.clear();
    if (index < 0 || index >= this.#length) return;
    const line = this.#lineOf(index);
    cursor.add(this.#staticRange(line, index, index + 1));
    if (!follow) return;
    const [box, view] = [this.#liveRange(line, index).getBoundingClientRect(), this.#root.getBoundingClientRect()];
    if (box.top < view.top) this.#root.scrollTop += box.top - view.top - 8;
    if (box.bottom > view.bottom) this.#root.scrollTop += box.bottom - view.bottom + 8;
  }

  static clearCursor() {
    cursor.clear();
  }

  /** Return the index of the character at a point of the window, or null if there is none. */
  indexAt(x, y) {
    const caret = document.caretPositionFromPoint?.(x, y) ?? toCaretPosition(document.caretRangeFromPoint?.(x, y));
    const line = this.#lines.find(({ node }) => node === caret?.offsetNode);
    if (!line) return null;
    const offset = Array.from(line.node.data.slice(0, caret.offset)).length;
    // The caret is between two characters: choose the one whose box contains the point.
    for (const index of [line.start + offset, line.start + offset - 1]) {
      if (index < line.start || index >= line.start + line.count) continue;
      const boxes = Array.from(this.#liveRange(line, index).getClientRects());
      if (boxes.some((box) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom)) return index;
    }
    return line.count ? Math.min(line.start + offset, line.start + line.count - 1) : null;
  }

  /** A range of one character. Only a live range has boxes; highlights use static ones, which are cheaper. */
  #liveRange(line, index) {
    const range = document.createRange();
    range.setStart(line.node, this.#offset(line, index));
    range.setEnd(line.node, this.#offset(line, index + 1));
    return range;
  }

  #staticRange(line, from, to) {
    const [startOffset, endOffset] = [this.#offset(line, from), this.#offset(line, to)];
    return new StaticRange({ startContainer: line.node, endContainer: line.node, startOffset, endOffset });
  }

  /** The offset of a character in its text node, in UTF-16 units: characters beyond U+FFFF have two. */
  #offset(line, index) {
    const offset = index - line.start;
    if (line.node.length === line.count) return offset;
    return Array.from(line.node.data).slice(0, offset).join("").length;
  }

  #lineOf(index) {
    let [low, high] = [0, this.#lines.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#lines[middle].start + this.#lines[middle].count > index) high = middle;
      else low = middle + 1;
    }
    return this.#lines[low];
  }
}

const toCaretPosition = (range) => range && { offsetNode: range.startContainer, offset: range.startOffset };
