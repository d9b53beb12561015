/**
 * What is drawn with on a stage. Brush, eraser, box and lasso change a mask; `Frame` draws a rectangle and nothing else.
 * Each has `down`, `move`, `up` and `cancel`, with points in px of the photo, and `draw`, which shows it on a stage's top layer.
 */
import { box, capsule, polygon } from "./geometry.js";

/** Brush, eraser, box and lasso over a mask: one stroke is one step of undo. */
export class MaskTools {
  /**
   * @param {(bounds: ?import("./geometry.js").Bounds, whole: boolean) => void} changed told of each change; whole: the stroke
   *     has ended
   */
  constructor(changed) {
    this.changed = changed;
    this.name = "brush";
    this.size = 32; // Of the brush: its diameter, px of the photo.
    this.mask = null;
    this.points = null;
  }

  /** Whether a key that draws is held down, as for a brush, or pressed twice. */
  get held() { return this.byHolding && this.#strokes(); }

  down(point, erase = false, byHolding = false) {
    this.value = this.name === "eraser" || erase ? 0 : 1;
    this.byHolding = byHolding;
    this.points = [point];
    this.mask.begin();
    if (this.#strokes()) this.#add(point, point);
  }

  move(point) {
    if (!this.points) return;
    const last = this.points.at(-1);
    if (last.x === point.x && last.y === point.y) return;
    this.points.push(point);
    if (this.#strokes()) this.#add(last, point);
  }

  up() {
    if (!this.points) return;
    const { width, height } = this.mask, first = this.points[0], last = this.points.at(-1);
    if (this.name === "box") this.#apply(box(first, last, width, height));
    if (this.name === "lasso") this.#apply(polygon(this.points, width, height));
    this.points = null;
    this.mask.end();
    this.changed(null, true);
  }

  cancel() {
    this.points = null;
    this.changed(this.mask?.cancel() ?? null, true);
  }

  draw(context, view, cursor) {
    const screen = ({ x, y }) => [view.left + x * view.scale, view.top + y * view.scale];
    if (this.points && this.name === "box") outline(context, rectangle(screen(this.points[0]), screen(this.points.at(-1))), true);
    if (this.points && this.name === "lasso") outline(context, path(this.points.map(screen)), true);
    if (!cursor) return;
    outline(context, this.#strokes() ? circle(screen(cursor), (this.size / 2) * view.scale) : cross(screen(cursor)));
  }

  #strokes() { return this.name === "brush" || this.name === "eraser"; }

  #add(from, to) { this.#apply(capsule(from, to, this.size / 2, this.mask.width, this.mask.height)); }

  #apply(shape) {
    this.mask.add(shape, this.value);
    this.changed(shape.bounds, false);
  }
}

/** A rectangle on a photo, to cut a reference out. */
export class Frame {
  /** @param {(bounds: ?import("./geometry.js").Bounds) => void} changed told when a rectangle is there, or gone */
  constructor(changed) {
    this.changed = changed;
    this.photo = null; // Its size.
    this.clear();
  }

  clear() { this.first = this.last = this.bounds = null; }

  down(point) {
    this.first = this.last = point;
    this.bounds = null;
    this.changed(null);
  }

  move(point) { this.last = point; }

  up() {
    const { bounds } = box(this.first, this.last, this.photo.width, this.photo.height);
    this.bounds = bounds.right > bounds.left && bounds.bottom > bounds.top ? bounds : null;
    this.first = null;
    this.changed(this.bounds);
  }

  cancel() {
    this.clear();
    this.changed(null);
  }

  draw(context, view, cursor) {
    const screen = (x, y) => [view.left + x * view.scale, view.top + y * view.scale];
    const { first, last, bounds } = this;
    if (first) outline(context, rectangle(screen(first.x, first.y), screen(last.x, last.y)), true);
    else if (bounds) outline(context, rectangle(screen(bounds.left, bounds.top), screen(bounds.right, bounds.bottom)), true);
    if (cursor) outline(context, cross(screen(cursor.x, cursor.y)));
  }
}

/** A line that is seen on anything: light on dark. */
function outline(context, line, dashed = false) {
  for (const [colour, width, dash] of [["rgb(0 0 0 / 65%)", 3, []], ["white", 1.5, dashed ? [6, 4] : []]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.stroke(line);
  }
}

function circle([x, y], radius) {
  const line = new Path2D();
  line.arc(x, y, Math.max(1, radius), 0, 2 * Math.PI);
  return line;
}

function cross([x, y]) {
  const line = new Path2D();
  for (const [right, down] of [[9, 0], [0, 9]]) {
    line.moveTo(x - right, y - down);
    line.lineTo(x + right, y + down);
  }
  return line;
}

function rectangle([x, y], [toX, toY]) {
  const line = new Path2D();
  line.rect(x, y, toX - x, toY - y);
  return line;
}

function path(points) {
  const line = new Path2D();
  points.forEach((point, number) => (number ? line.lineTo(...point) : line.moveTo(...point)));
  return line;
}
