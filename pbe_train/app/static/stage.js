/**
 * A stage: a photo that one looks at closely and draws on, with mouse, fingers, pen or keys.
 *
 *     photo layer    drawn anew when the view changes
 *     mask layer     drawn where the mask changes
 *     top layer      cursor and what is being drawn; it has the pointer and the keyboard
 *
 * All layers are of the stage's size on the screen, whatever the photo's: nothing here grows with the photo but its own picture.
 * What drawing does is the tool's: `down`, `move`, `up`, `cancel` (points in px of the photo) and `draw` (onto the top layer).
 */
import { snap, union } from "./geometry.js";
import { fit, pan, reveal, toPhoto, zoom } from "./view.js";

const MASK = [226, 92, 35]; // RGB, 0-255: seldom a photo's, and seen by all kinds of colour vision beside most.
const MASK_ALPHA = 120;
const EDGE = [255, 255, 255];
const NOTCH = 1.2; // Of zoom, one turn of a wheel or one key.
const ARROW = 12; // Px of the screen that an arrow key moves the cursor.
const SMOOTH = 8; // Px of the screen for a px of the photo from which on one wants to see the px.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const bgr = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;

export class Stage {
  /**
   * @param {HTMLElement} element with three canvases
   * @param {object} tool what draws
   * @param {(erase: boolean) => boolean} [hand] whether the pointer moves the photo instead of drawing
   */
  constructor(element, tool, hand = () => false) {
    this.element = element;
    [this.photoLayer, this.maskLayer, this.topLayer] = element.querySelectorAll("canvas");
    this.tool = tool;
    this.hand = hand;
    this.picture = null;
    this.mask = null;
    this.view = { scale: 1, left: 0, top: 0 };
    this.fitted = true;
    this.cursor = null;
    this.pointers = new Map();
    this.doing = null; // "draw", "pan" or "pinch" while pointers are down, "keys" while a key draws.
    this.dirty = { photo: false, mask: null, top: false, waiting: false };
    new ResizeObserver(() => this.#resize()).observe(element);
    this.#listen();
  }

  /** Show a picture, all of it. @param {?import("./pictures.js").Picture} picture @param {?import("./mask.js").Mask} mask */
  show(picture, mask = null) {
    this.stop();
    Object.assign(this, { picture, mask, cursor: null });
    this.element.classList.toggle("empty", !picture);
    this.fit();
  }

  fit() {
    this.fitted = true;
    if (this.picture) this.#look(fit(this.picture, this.size));
  }

  /** Closer or farther by notches, around the cursor or the middle. */
  zoom(notches) {
    const { width, height } = this.size;
    const { scale, left, top } = this.view, { cursor } = this;
    this.#zoomAt(NOTCH ** notches, ...(cursor ? [left + cursor.x * scale, top + cursor.y * scale] : [width / 2, height / 2]));
  }

  /** The mask has changed within bounds, or all of it. @param {?import("./geometry.js").Bounds} bounds */
  maskChanged(bounds = null) {
    const { width, height } = this.maskLayer, { scale, left, top } = this.view, density = this.#density();
    // Two px more on each side: the edge is drawn beside what changed.
    const low = (at, start) => Math.max(0, Math.floor((at * scale + start) * density) - 2);
    const high = (at, start, most) => Math.min(most, Math.ceil((at * scale + start) * density) + 2);
    const part = bounds ? {
      left: low(bounds.left, left), top: low(bounds.top, top),
      right: high(bounds.right, left, width), bottom: high(bounds.bottom, top, height),
    } : { left: 0, top: 0, right: width, bottom: height };
    this.dirty.mask = union(this.dirty.mask, part);
    this.#redraw();
  }

  toolChanged() { this.dirty.top = true; this.#redraw(); }

  /** Give up what is being drawn. @returns {boolean} whether anything was */
  stop() {
    const was = this.doing === "draw" || this.doing === "keys";
    if (was) this.tool.cancel();
    this.doing = this.pointers.size ? "pinch" : null;
    this.toolChanged();
    return was;
  }

  get size() { return { width: this.element.clientWidth, height: this.element.clientHeight }; }

  #density() { return this.topLayer.width / Math.max(1, this.element.clientWidth); }

  #listen() {
    const top = this.topLayer;
    top.addEventListener("pointerdown", (event) => this.#pointerDown(event));
    top.addEventListener("pointermove", (event) => this.#pointerMove(event));
    for (const kind of ["pointerup", "pointercancel"]) top.addEventListener(kind, (event) => this.#pointerUp(event));
    top.addEventListener("pointerleave", () => { if (!this.pointers.size && this.doing !== "keys") this.#moveCursor(null); });
    top.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    top.addEventListener("contextmenu", (event) => event.preventDefault());
    top.addEventListener("keydown", (event) => this.#keyDown(event));
    top.addEventListener("keyup", (event) => { if (event.key === " " && this.doing === "keys" && this.tool.held) this.#lift(); });
    top.addEventListener("focus", () => { if (top.matches(":focus-visible")) this.#moveCursor(this.cursor ?? this.#middle()); });
    top.addEventListener("blur", () => { if (this.doing === "keys") this.#lift(); this.toolChanged(); });
  }

  #point(event) {
    const corner = this.topLayer.getBoundingClientRect();
    return snap(...toPhoto(this.view, event.clientX - corner.left, event.clientY - corner.top));
  }

  #pointerDown(event) {
    if (!this.picture || event.button > 1) return;
    event.preventDefault();
    this.topLayer.focus({ preventScroll: true });
    if (this.doing === "keys") this.#lift();
    this.topLayer.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    if (this.pointers.size > 1) {
      // What the first finger has drawn meanwhile was no stroke, but the beginning of a pinch.
      this.stop();
    } else if (event.button === 1 || this.hand()) {
      this.doing = "pan";
    } else {
      this.doing = "draw";
      this.tool.down(this.#point(event), event.altKey);
    }
    this.#moveCursor(this.#point(event));
  }

  #pointerMove(event) {
    const before = this.pointers.get(event.pointerId);
    if (this.doing === "draw" && before) {
      const all = event.getCoalescedEvents?.() ?? [];
      for (const one of all.length ? all : [event]) this.tool.move(this.#point(one));
    } else if (before && this.doing) {
      this.#movePhoto(event, before);
    }
    if (before) this.pointers.set(event.pointerId, event);
    if (this.doing !== "keys") this.#moveCursor(this.#point(event));
  }

  /** One pointer moves the photo; two move and scale it, each by its share. */
  #movePhoto(event, before) {
    const { left, top } = this.topLayer.getBoundingClientRect();
    this.fitted = false;
    const share = this.pointers.size;
    const other = [...this.pointers.values()].find((one) => one.pointerId !== event.pointerId);
    const right = (event.clientX - before.clientX) / share, down = (event.clientY - before.clientY) / share;
    this.#look(pan(this.view, right, down, this.picture, this.size));
    if (!other) return;
    const distance = (one) => Math.max(1, Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY));
    const x = (event.clientX + other.clientX) / 2 - left, y = (event.clientY + other.clientY) / 2 - top;
    this.#zoomAt(distance(event) / distance(before), x, y);
  }

  #pointerUp(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    if (this.doing === "draw") event.type === "pointerup" ? this.tool.up() : this.tool.cancel();
    if (!this.pointers.size) this.doing = null;
    // A finger leaves no cursor behind.
    this.#moveCursor(event.pointerType === "touch" ? null : this.#point(event));
  }

  #wheel(event) {
    if (!this.picture) return;
    const { left, top } = this.topLayer.getBoundingClientRect();
    const lines = event.deltaY * (event.deltaMode === 1 ? 33 : 1);
    const before = this.view;
    this.#zoomAt(NOTCH ** (-lines / 100), event.clientX - left, event.clientY - top);
    // A wheel that turns on when the whole photo is seen scrolls the page.
    if (this.view !== before || event.ctrlKey) event.preventDefault();
  }

  #zoomAt(factor, x, y) {
    if (!this.picture) return;
    const next = zoom(this.view, factor, x, y, this.picture, this.size);
    if (next.scale === this.view.scale) return;
    this.fitted = next.scale === fit(this.picture, this.size).scale;
    this.#look(next);
  }

  #keyDown(event) {
    const arrow = ARROWS[event.key];
    if (!this.picture || event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrow) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(ARROW / this.view.scale));
      const from = this.cursor ?? this.#middle();
      const { width, height } = this.picture, within = (at, most) => Math.min(most, Math.max(0, at));
      const to = snap(within(from.x + arrow[0] * step, width), within(from.y + arrow[1] * step, height));
      if (this.doing === "keys") this.tool.move(to);
      this.#moveCursor(to);
      this.fitted &&= reveal(this.view, to, this.picture, this.size) === this.view;
      if (!this.fitted) this.#look(reveal(this.view, to, this.picture, this.size));
    } else if (event.key === " " || event.key === "Enter") {
      if (event.repeat) { event.preventDefault(); return; }
      if (this.doing === "keys") this.#lift();
      else if (!this.doing) {
        this.#moveCursor(this.cursor ?? this.#middle());
        this.doing = "keys";
        this.tool.down(this.cursor, false, event.key === " ");
      }
    } else return;
    event.preventDefault();
  }

  #lift() {
    this.doing = null;
    this.tool.up();
    this.toolChanged();
  }

  #middle() {
    const [x, y] = toPhoto(this.view, this.size.width / 2, this.size.height / 2);
    return { x: Math.round(x), y: Math.round(y) };
  }

  #moveCursor(point) {
    this.cursor = this.picture && point;
    this.toolChanged();
  }

  #look(view) {
    this.view = view;
    // For whoever looks from outside: where a point of the photo is on the screen.
    Object.assign(this.element.dataset, view);
    this.dirty.photo = this.dirty.top = true;
    this.maskChanged();
  }

  #resize() {
    const density = window.devicePixelRatio || 1, { width, height } = this.size;
    for (const layer of [this.photoLayer, this.maskLayer, this.topLayer]) {
      layer.width = Math.max(1, Math.round(width * density));
      layer.height = Math.max(1, Math.round(height * density));
    }
    if (!this.picture) return;
    this.#look(this.fitted ? fit(this.picture, this.size) : pan(this.view, 0, 0, this.picture, this.size));
  }

  #redraw() {
    if (this.dirty.waiting) return;
    this.dirty.waiting = true;
    requestAnimationFrame(() => {
      const { photo, mask, top } = this.dirty;
      this.dirty = { photo: false, mask: null, top: false, waiting: false };
      if (photo) this.#drawPhoto();
      if (mask) this.#drawMask(mask);
      if (top) this.#drawTop();
    });
  }

  #drawPhoto() {
    const context = this.photoLayer.getContext("2d"), density = this.#density();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.photoLayer.width, this.photoLayer.height);
    if (!this.picture) return;
    const { scale, left, top } = this.view;
    const image = this.picture.at(scale * density, () => { this.dirty.photo = true; this.#redraw(); });
    if (!image) return;
    context.setTransform(density, 0, 0, density, 0, 0);
    context.imageSmoothingEnabled = scale < SMOOTH;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, left, top, this.picture.width * scale, this.picture.height * scale);
  }

  /** Each px of the layer within bounds takes the mask's px under it; where two neighbours differ is the mask's edge. */
  #drawMask({ left, top, right, bottom }) {
    const context = this.maskLayer.getContext("2d");
    if (right <= left || bottom <= top) return;
    if (!this.mask) { context.clearRect(left, top, right - left, bottom - top); return; }
    const { data, width, height } = this.mask, density = this.#density(), { scale } = this.view;
    const index = (length, first, start, most) => Int32Array.from({ length: length + 1 }, (_, at) => {
      const place = Math.floor(((first + at + 0.5) / density - start) / scale);
      return place >= 0 && place < most ? place : -1;
    });
    const columns = index(right - left, left, this.view.left, width), rows = index(bottom - top, top, this.view.top, height);
    const picture = context.createImageData(right - left, bottom - top), colours = new Uint32Array(picture.data.buffer);
    const inside = bgr(MASK, MASK_ALPHA), edge = bgr(EDGE, 255);
    const value = (row, column) => (row < 0 || column < 0 ? 0 : data[row * width + column]);
    for (let y = 0, at = 0; y < picture.height; y++) {
      const row = rows[y], below = rows[y + 1];
      for (let x = 0; x < picture.width; x++, at++) {
        const here = value(row, columns[x]);
        if (here !== value(row, columns[x + 1]) || here !== value(below, columns[x])) colours[at] = edge;
        else if (here) colours[at] = inside;
      }
    }
    context.putImageData(picture, left, top);
  }

  #drawTop() {
    const context = this.topLayer.getContext("2d"), density = this.#density();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.topLayer.width, this.topLayer.height);
    if (!this.picture) return;
    context.setTransform(density, 0, 0, density, 0, 0);
    this.topLayer.classList.toggle("hand", this.hand());
    this.tool.draw(context, this.view, this.hand() ? null : this.cursor);
  }
}
