// A text on the page. Every line but the last is an element of its own, so that what is added lays out one line again.
// Colours and the cursor are highlights: they are painted over the text and change no element and no layout.

export const LEVELS = 17; // of colours, from -1 to 1

const highlight = (name) => {
  const found = new Highlight();
  CSS.highlights.set(name, found);
  return found;
};
const levels = Array.from({ length: LEVELS }, (_, level) => highlight(`level-${level}`));
const cursor = highlight("cursor");
cursor.priority = 1;

/** -1 .. 1 -> the number of a highlight; null: none. */
export const levelOf = (value) =>
  Number.isNaN(value) ? null : Math.round(((Math.max(-1, Math.min(1, value)) + 1) / 2) * (LEVELS - 1));

/** Fills an element. Places are indices of code points in the whole text. Text becomes text, never markup. */
export class TextView {
  #root;
  #tail; // the element of the last line, in which `end` (what a text is typed into) follows the text
  #lines; // {start, count, node}: the last one is the tail's
  #painted = []; // {from, to, level, range}, in their order
  #paintedTo = 0;

  constructor(root, end) {
    this.#root = root;
    this.#tail = root.appendChild(document.createElement("div"));
    this.#tail.append(...end);
    this.#lines = [this.#newLine(0)];
  }

  get #length() {
    const last = this.#lines.at(-1);
    return last.start + last.count;
  }

  /** Show chars from an index on anew; what lies before it stays as it is. */
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
      if (newline >= 0) this.#close(line);
    }
    if (isAtEnd) this.#root.scrollTop = this.#root.scrollHeight;
  }

  #newLine(start) {
    const node = document.createTextNode("");
    this.#tail.prepend(node);
    return { start, count: 0, node };
  }

  /** The node moves, and with it what is painted on it. */
  #close(line) {
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

  /** Colour what has no colour yet, up to an index. valueOf: index -> -1 to 1, NaN: none. */
  paint(valueOf, end) {
    for (let at = this.#paintedTo; at < end; ) {
      const line = this.#lineOf(at);
      const last = Math.min(end, line.start + line.count);
      const level = levelOf(valueOf(at));
      let next = at + 1;
      while (next < last && levelOf(valueOf(next)) === level) next++;
      if (level !== null) {
        const range = this.#range(line, at, next);
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

  /** Mark one character. follow: bring it into sight. */
  mark(index, follow) {
    cursor.clear();
    if (index < 0 || index >= this.#length) return;
    const line = this.#lineOf(index);
    cursor.add(this.#range(line, index, index + 1));
    if (!follow) return;
    const [box, all] = [this.box(index), this.#root.getBoundingClientRect()];
    if (box.top < all.top) this.#root.scrollTop += box.top - all.top - 8;
    if (box.bottom > all.bottom) this.#root.scrollTop += box.bottom - all.bottom + 8;
  }

  static unmark() {
    cursor.clear();
  }

  /** The index of the character under a point of the window; null: there is none. */
  at(x, y) {
    const caret = document.caretPositionFromPoint?.(x, y) ?? fromRange(document.caretRangeFromPoint?.(x, y));
    const line = this.#lines.find(({ node }) => node === caret?.offsetNode);
    if (!line) return null;
    const offset = Array.from(line.node.data.slice(0, caret.offset)).length;
    // A caret stands between two characters: it is the one whose box is under the point.
    for (const index of [line.start + offset, line.start + offset - 1]) {
      if (index < line.start || index >= line.start + line.count) continue;
      const boxes = Array.from(this.#live(line, index).getClientRects());
      if (boxes.some((box) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom)) return index;
    }
    return line.count ? Math.min(line.start + offset, line.start + line.count - 1) : null;
  }

  /** The place of a character in the window. */
  box(index) {
    return this.#live(this.#lineOf(index), index).getBoundingClientRect();
  }

  #live(line, index) {
    const range = document.createRange();
    range.setStart(line.node, this.#offset(line, index));
    range.setEnd(line.node, this.#offset(line, index + 1));
    return range;
  }

  #range(line, from, to) {
    const [startOffset, endOffset] = [this.#offset(line, from), this.#offset(line, to)];
    return new StaticRange({ startContainer: line.node, endContainer: line.node, startOffset, endOffset });
  }

  /** In the units of a text node: characters beyond U+FFFF have two. */
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

const fromRange = (range) => range && { offsetNode: range.startContainer, offset: range.startOffset };
