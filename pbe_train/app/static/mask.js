/**
 * A mask at the photo's full size, one byte a pixel (1 = repaint), whose changes can be taken back.
 *
 *     begin ──▶ add, add, ... ──▶ end: one step of undo
 *
 * A step keeps what it changed as tiles of 256 x 256 px of one bit a pixel, the mask as it was before. Undo swaps them with what
 * is there, which makes them what redo needs. Steps together keep no more than `MOST_KEPT` bytes; the oldest are forgotten first.
 */
import { union } from "./geometry.js";

const TILE = 256;
/** Bytes of all steps together: a hundred strokes over all of a photo of 6000 x 4000 px would need three times that. */
export const MOST_KEPT = 96 << 20;

export class Mask {
  /** @param {number} width px @param {number} height px @param {number} [mostKept] bytes */
  constructor(width, height, mostKept = MOST_KEPT) {
    this.width = width;
    this.height = height;
    this.data = new Uint8Array(width * height);
    this.mostKept = mostKept;
    this.undone = [];
    this.done = [];
    this.step = null;
    /** Another number after each change: whoever keeps something made of the mask knows by it whether that is still true. */
    this.version = 0;
  }

  get canUndo() { return this.done.length > 0; }
  get canRedo() { return this.undone.length > 0; }
  get keptBytes() { return [...this.done, ...this.undone].reduce((sum, step) => sum + step.bytes, 0); }

  /** Start a step of undo. */
  begin() {
    this.step = { tiles: new Map(), bounds: null, bytes: 0 };
  }

  /** Set all of a shape to 1, or to 0. Within a step. @param {import("./geometry.js").Shape} shape @param {0|1} value */
  add(shape, value) {
    this.#keep(shape.bounds);
    shape.spans((row, start, end) => this.data.fill(value, row * this.width + start, row * this.width + end));
    this.version++;
  }

  /** End the step. One that touched no pixel is none. */
  end() {
    const step = this.step;
    this.step = null;
    if (!step?.bounds) return;
    this.undone = [];
    this.done.push(step);
    while (this.done.length > 1 && this.keptBytes > this.mostKept) this.done.shift();
  }

  /** Take back the step that has begun, as if it had not. @returns {?import("./geometry.js").Bounds} what changed */
  cancel() {
    const step = this.step;
    this.step = null;
    if (step) this.#swap(step);
    return step?.bounds ?? null;
  }

  /** @returns {?import("./geometry.js").Bounds} what changed */
  undo() { return this.#move(this.done, this.undone); }
  redo() { return this.#move(this.undone, this.done); }

  /** One step that computes all of the mask anew. @param {(data: Uint8Array) => void} change in place */
  changeAll(change) {
    this.begin();
    this.#keep(this.#all());
    change(this.data);
    this.version++;
    this.end();
  }

  invert() {
    this.changeAll((data) => { for (let at = 0; at < data.length; at++) data[at] ^= 1; });
  }

  clear() { this.changeAll((data) => data.fill(0)); }

  /** Pixels that are 1. */
  count() {
    let sum = 0;
    for (let at = 0; at < this.data.length; at++) sum += this.data[at];
    return sum;
  }

  #all() { return { left: 0, top: 0, right: this.width, bottom: this.height }; }

  #move(from, to) {
    const step = from.pop();
    if (!step) return null;
    this.#swap(step);
    to.push(step);
    return step.bounds;
  }

  #swap(step) {
    for (const [number, kept] of step.tiles) {
      const now = this.#pack(number);
      this.#unpack(number, kept);
      step.tiles.set(number, now);
    }
    this.version++;
  }

  /** Keep the tiles that bounds touch, as they are before the step first changes them. */
  #keep(bounds) {
    if (bounds.left >= bounds.right || bounds.top >= bounds.bottom) return;
    const across = Math.ceil(this.width / TILE), { tiles } = this.step;
    for (let y = Math.floor(bounds.top / TILE); y * TILE < bounds.bottom; y++) {
      for (let x = Math.floor(bounds.left / TILE); x * TILE < bounds.right; x++) {
        const number = y * across + x;
        if (tiles.has(number)) continue;
        const kept = this.#pack(number);
        tiles.set(number, kept);
        this.step.bytes += kept.length;
      }
    }
    this.step.bounds = union(this.step.bounds, bounds);
  }

  #tile(number) {
    const across = Math.ceil(this.width / TILE);
    const left = (number % across) * TILE, top = Math.floor(number / across) * TILE;
    return { left, top, right: Math.min(left + TILE, this.width), bottom: Math.min(top + TILE, this.height) };
  }

  #pack(number) {
    const { left, top, right, bottom } = this.#tile(number);
    return packBits(this.data, this.width, left, top, right, bottom);
  }

  #unpack(number, bits) {
    const { left, top, right, bottom } = this.#tile(number);
    const stride = (right - left + 7) >> 3;
    for (let row = top; row < bottom; row++) {
      const from = (row - top) * stride, to = row * this.width + left;
      for (let x = 0; x < right - left; x++) this.data[to + x] = (bits[from + (x >> 3)] >> (7 - (x & 7))) & 1;
    }
  }
}

/** A window of bytes 0 and 1 as bits, the first in the highest bit, each row from a new byte on (as PNG has them). */
export function packBits(data, width, left, top, right, bottom, ahead = 0) {
  const stride = ahead + ((right - left + 7) >> 3);
  const bits = new Uint8Array(stride * (bottom - top));
  for (let row = top; row < bottom; row++) {
    const from = row * width + left, to = (row - top) * stride + ahead;
    for (let x = 0; x < right - left; x++) if (data[from + x]) bits[to + (x >> 3)] |= 128 >> (x & 7);
  }
  return bits;
}

/** The smallest bounds around what is 1. @param {Mask} mask @returns {?import("./geometry.js").Bounds} */
export function boundsOf(mask) {
  const { data, width, height } = mask;
  let left = width, right = 0, top = -1, bottom = 0;
  for (let row = 0; row < height; row++) {
    const line = data.subarray(row * width, (row + 1) * width), first = line.indexOf(1);
    if (first < 0) continue;
    if (top < 0) top = row;
    bottom = row + 1;
    left = Math.min(left, first);
    right = Math.max(right, line.lastIndexOf(1) + 1);
  }
  return top < 0 ? null : { left, top, right, bottom };
}
