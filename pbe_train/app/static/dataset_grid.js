/**
 * A grid of millions of tiles: only those that are seen exist.
 *
 * Browsers draw nothing beyond some ten million pixels. So the scroll bar is that of a shorter element, and `top`, where the view
 * is among all rows in px, is kept beside it: a wheel or a finger moves `top` by as much as it moves the bar; dragging the bar, which
 * leaps further than a screen, moves it in proportion.
 */

import { getPicture } from "./dataset_api.js";
import { counted, make } from "./dataset_parts.js";

const TALLEST = 8_000_000;
const LEAST_WIDTH = 124;
const CAPTION = 28;
const CHUNK = 60;
const KEPT_CHUNKS = 50;
/** While one leaps through the grid nothing is asked for. */
const PAUSE = 70;

export class Grid {
  /**
   * @param {HTMLElement} scroller @param {HTMLElement} layer @param {HTMLElement} spacer
   * @param {{rows: (first: number, count: number) => Promise<object[]>, picture: (row: object) => string,
   *   isMarked: (row: object) => boolean, open: (index: number) => void, fail: (problem: Error) => void}} source
   */
  constructor(scroller, layer, spacer, source) {
    Object.assign(this, { scroller, layer, spacer, source, total: 0, top: 0, current: 0, columns: 1, bar: 0, dragging: false });
    this.tiles = new Map();
    this.chunks = new Map();
    this.shape();
    scroller.addEventListener("scroll", () => this.scrolled());
    scroller.addEventListener("pointerdown", (event) => {
      this.dragging = event.offsetX > scroller.clientWidth && event.target === scroller;
    });
    for (const kind of ["wheel", "touchstart", "pointermove"]) {
      scroller.addEventListener(kind, (event) => (this.dragging &&= kind === "pointermove" && event.buttons > 0), { passive: true });
    }
    scroller.addEventListener("keydown", (event) => this.pressed(event));
    new ResizeObserver(() => this.reshape()).observe(scroller);
  }

  /** Show other samples. @param {number} total @param {boolean} anew whether they are others than before, and not more of them */
  show(total, anew) {
    if (anew) {
      this.chunks.clear();
      this.clear();
      this.current = 0;
      this.top = 0;
    } else if (total !== this.total) {
      this.chunks.delete(Math.floor(this.total / CHUNK)); // The last one had an end.
    }
    this.total = total;
    this.current = Math.min(this.current, Math.max(0, total - 1));
    this.resize();
    this.moveTo(this.top);
    this.ask();
  }

  /** Bring a sample into view, and make it the current one. @param {number} index @param {boolean} focus */
  go(index, focus) {
    if (!this.total) return;
    this.current = Math.max(0, Math.min(this.total - 1, index));
    const start = Math.floor(this.current / this.columns) * this.height;
    const seen = this.scroller.clientHeight;
    if (start < this.top) this.moveTo(start);
    else if (start + this.height > this.top + seen) this.moveTo(start + this.height - seen);
    else this.draw();
    this.ask();
    if (focus) this.tiles.get(this.current)?.node.focus({ preventScroll: true });
  }

  /** The row of a sample. @param {number} index @returns {Promise<object|undefined>} */
  async rowAt(index) {
    return (await this.chunk(Math.floor(index / CHUNK)))[index % CHUNK];
  }

  /** Draw marks anew. */
  refresh() {
    for (const tile of this.tiles.values()) this.mark(tile);
  }

  get rows() {
    return Math.ceil(this.total / this.columns);
  }

  get furthest() {
    return Math.max(0, this.rows * this.height - this.scroller.clientHeight);
  }

  shape() {
    const width = this.scroller.clientWidth || 600;
    this.columns = Math.max(2, Math.floor(width / LEAST_WIDTH));
    this.width = width / this.columns;
    this.height = Math.round(this.width) + CAPTION;
  }

  reshape() {
    const first = Math.floor(this.top / this.height) * this.columns;
    this.shape();
    this.clear();
    this.resize();
    this.moveTo(Math.floor(first / this.columns) * this.height);
    this.ask();
  }

  resize() {
    this.spacer.style.height = `${Math.min(TALLEST, this.rows * this.height)}px`;
  }

  /** Where the bar's end is. */
  get barEnd() {
    return Math.max(0, this.scroller.scrollHeight - this.scroller.clientHeight);
  }

  scrolled() {
    const bar = this.scroller.scrollTop;
    const moved = bar - this.bar;
    if (!moved) return;
    this.bar = bar;
    const scaled = this.barEnd && this.furthest > this.barEnd;
    const leaps = this.dragging || Math.abs(moved) > 2 * this.scroller.clientHeight;
    const wanted = scaled && leaps ? (bar / this.barEnd) * this.furthest : scaled ? this.top + moved : bar;
    this.top = Math.max(0, Math.min(this.furthest, wanted));
    this.draw();
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => {
      if (!this.dragging) this.moveTo(this.top); // The bar goes where it belongs.
      this.ask();
    }, PAUSE);
  }

  moveTo(top) {
    this.top = Math.max(0, Math.min(this.furthest, top));
    const bar = this.furthest > this.barEnd ? (this.top / this.furthest) * this.barEnd : this.top;
    this.scroller.scrollTop = bar;
    this.bar = this.scroller.scrollTop;
    this.draw();
  }

  /** Make tiles of what is seen, and let go of the others. */
  draw() {
    const first = Math.floor(this.top / this.height) * this.columns;
    const after = Math.min(this.total, Math.ceil((this.top + this.scroller.clientHeight) / this.height) * this.columns);
    for (const [index, tile] of this.tiles) {
      if (index < first || index >= after) this.drop(index, tile);
    }
    for (let index = first; index < after; index++) {
      const tile = this.tiles.get(index) ?? this.add(index);
      const row = Math.floor(index / this.columns);
      tile.node.style.transform = `translate(${(index % this.columns) * this.width}px, ${row * this.height - this.top}px)`;
      tile.node.tabIndex = index === this.current ? 0 : -1;
    }
    if (!this.tiles.has(this.current) && this.tiles.size) this.tiles.get(first).node.tabIndex = 0;
  }

  add(index) {
    const frame = make("span", { className: "frame" });
    const name = make("span", { className: "name" });
    const node = make("button", { type: "button", className: "tile", onclick: () => this.source.open(index) }, frame, name);
    node.dataset.index = index;
    node.setAttribute("aria-label", `Sample ${counted(index + 1)} of ${counted(this.total)}`);
    node.onfocus = () => this.focused(index);
    node.style.width = `${this.width}px`;
    node.style.height = `${this.height}px`;
    const tile = { node, frame, name, row: null, url: "", stop: null };
    this.tiles.set(index, tile);
    this.layer.append(node);
    return tile;
  }

  focused(index) {
    const before = this.tiles.get(this.current);
    if (before) before.node.tabIndex = -1;
    this.current = index;
    this.tiles.get(index).node.tabIndex = 0;
  }

  drop(index, tile) {
    tile.stop?.abort();
    if (tile.url) URL.revokeObjectURL(tile.url);
    // Focus that goes with its tile would be nowhere.
    if (tile.node === document.activeElement) this.scroller.focus({ preventScroll: true });
    tile.node.remove();
    this.tiles.delete(index);
  }

  clear() {
    for (const [index, tile] of this.tiles) this.drop(index, tile);
  }

  /** Ask for the rows and pictures of the tiles that have none. */
  ask() {
    for (const [index, tile] of this.tiles) {
      if (!tile.row && !tile.stop) this.fill(index, tile);
    }
  }

  async fill(index, tile) {
    tile.stop = new AbortController();
    try {
      tile.row = await this.rowAt(index);
      if (!tile.row || this.tiles.get(index) !== tile) return;
      tile.name.textContent = tile.row.label_name;
      tile.node.title = tile.row.key;
      tile.node.setAttribute("aria-label", `${tile.row.label_name}, ${tile.row.key}, sample ${counted(index + 1)} of ${counted(this.total)}`);
      this.mark(tile);
      const { data } = await getPicture(this.source.picture(tile.row), tile.stop.signal);
      if (this.tiles.get(index) !== tile) return;
      tile.url = URL.createObjectURL(data);
      tile.frame.replaceChildren(make("img", { src: tile.url, alt: "", draggable: false }));
    } catch (problem) {
      if (problem.name === "AbortError" || this.tiles.get(index) !== tile) return;
      tile.frame.replaceChildren(make("span", { className: "problem" }, problem.message));
    }
  }

  mark(tile) {
    const marked = Boolean(tile.row) && this.source.isMarked(tile.row);
    tile.node.classList.toggle("marked", marked);
  }

  chunk(number) {
    let rows = this.chunks.get(number);
    if (!rows) {
      rows = this.source.rows(number * CHUNK, CHUNK);
      const kept = rows;
      rows.catch(() => this.chunks.get(number) === kept && this.chunks.delete(number));
    }
    this.chunks.delete(number);
    this.chunks.set(number, rows);
    if (this.chunks.size > KEPT_CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
    return rows;
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const screen = Math.max(1, Math.floor(this.scroller.clientHeight / this.height)) * this.columns;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -screen, PageDown: screen };
    const ends = { Home: 0, End: this.total - 1 };
    if (event.key in steps) this.go(this.current + steps[event.key], true);
    else if (event.key in ends) this.go(ends[event.key], true);
    else return;
    event.preventDefault();
  }
}
