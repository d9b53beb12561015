/**
 * The edits that were asked for, newest first: place in the queue, progress and previews while they are painted, then results
 * beside the original, and what can be downloaded.
 */
import { followEdit, forgetEdit, getEdit } from "./api.js";
import { Compare } from "./compare.js";
import { SMALL } from "./pictures.js";

const ENDED = ["done", "cancelled", "failed"];
const POLL = 2000; // Ms between looks at those that wait.

/**
 * @typedef {object} Edit what was asked for
 * @property {string} id
 * @property {import("./pictures.js").Picture} photo
 * @property {number[]} seeds
 * @property {string} told model and settings, for people
 * @property {number} line 0-100, where the line between before and after begins
 */

export class Results {
  /**
   * @param {HTMLElement} section
   * @param {object} calls `further(address, name)` makes a result the photo; `announce(text)` says it; `changed()`
   */
  constructor(section, calls) {
    this.section = section;
    this.list = section.querySelector("#edits");
    this.calls = calls;
    this.cards = [];
    this.made = 0;
    setInterval(() => { for (const card of this.cards) card.look(); }, POLL);
  }

  /** @param {Edit} edit @param {boolean} show whether to bring it into view */
  add(edit, show = true) {
    const calls = { ...this.calls, changed: () => { this.#listen(); this.calls.changed(); }, remove: () => this.#remove(card) };
    const card = new Card(edit, ++this.made, calls);
    this.cards.unshift(card);
    this.list.prepend(card.element);
    this.section.hidden = false;
    this.#listen();
    if (show) card.element.scrollIntoView({ block: "nearest" });
    this.calls.changed();
  }

  /** The edit that is painted or waits, the one asked for last. @returns {?Card} */
  get running() { return this.cards.find((card) => !card.ended) ?? null; }

  // A browser has six connections to a server, and each edit that is listened to takes one: only the oldest is, which is painted
  // first; the others are looked at now and then.
  #listen() {
    this.cards.findLast((card) => !card.ended)?.listen();
  }

  #remove(card) {
    this.cards = this.cards.filter((one) => one !== card);
    card.element.remove();
    this.section.hidden = !this.cards.length;
    this.calls.changed();
  }
}

class Card {
  constructor(edit, number, calls) {
    Object.assign(this, { edit, number, calls, ended: false, last: null, seed: null, stopListening: null });
    Object.assign(this, { chosen: 0, chosenByHand: false, previews: 0, loading: false });
    this.element = document.querySelector("#edit-template").content.firstElementChild.cloneNode(true);
    this.element.dataset.edit = edit.id;
    this.find = (selector) => this.element.querySelector(selector);
    this.find("h3").textContent = `Edit ${number}`;
    this.find(".told").textContent = edit.told;
    this.compare = new Compare(this.find(".compare"), edit.photo, edit.photo.url(SMALL), edit.line);
    this.tiles = edit.seeds.map((seed, place) => this.#tile(seed, place));
    this.find(".seeds").append(...this.tiles.map((tile) => tile.item));
    if (this.tiles.length === 1) this.tiles[0].item.hidden = true; // The large picture shows it.
    this.find(".forget").addEventListener("click", () => this.forget());
    this.find(".further").addEventListener("click", () => this.#further());
    this.#pace("Waiting");
  }

  /** Have each change told by the server, once it is this edit's turn. */
  listen() {
    this.stopListening ??= followEdit(this.edit.id, (state) => this.#take(state), (...problem) => this.#lost(...problem));
  }

  /** Ask the server how it stands with an edit that nobody listens to. */
  async look() {
    if (this.ended || this.stopListening) return;
    try {
      const state = await getEdit(this.edit.id);
      if (!this.ended && !this.stopListening) this.#take(state);
    } catch (error) {
      this.find(".error").textContent = error.message;
    }
  }

  /** Cancel what is not done, and take away what is. */
  async forget() {
    this.find(".error").textContent = "";
    const ended = this.ended; // What ends while the server answers was cancelled, and stays to be seen.
    try {
      await forgetEdit(this.edit.id);
    } catch (error) {
      // The server may have forgotten it first: then it can go here, too.
      if (!ended) { this.find(".error").textContent = error.message; return; }
    }
    if (ended) this.calls.remove();
    else this.look();
  }

  #take(state) {
    const before = this.last?.state;
    this.last = state;
    this.element.dataset.state = state.state;
    this.find(".error").textContent = state.error ?? "";
    state.results.forEach((result, place) => this.#result(result, place));
    if (state.state === "painting") this.#preview(state);
    this.#progress(state);
    const next = state.state === "painting" && state.seed_number !== this.seed;
    if (state.state !== before) this.#changed(state);
    else if (next) this.calls.announce(`Edit ${this.number}: ${this.find(".pace").textContent}.`);
    this.seed = state.seed_number;
  }

  #progress({ state, place, seed_number: seed, step, steps, seconds_left: left }) {
    const bar = this.find("progress"), count = this.edit.seeds.length;
    if (state === "waiting") {
      bar.removeAttribute("value");
      const before = place > 0 ? `Waiting: ${place} ${place === 1 ? "edit" : "edits"} before this one` : "Waiting";
      this.#pace(before + (left == null ? "" : `, about ${duration(left)} left`));
    } else if (state === "painting") {
      bar.max = steps * count;
      bar.value = steps * (seed ?? 0) + (step ?? 0);
      const of = count > 1 ? `Result ${(seed ?? 0) + 1} of ${count}, step` : "Step";
      this.#pace(`${of} ${step ?? 0} of ${steps}${left == null ? "" : `, about ${duration(left)} left`}`);
    }
  }

  #changed({ state, error }) {
    const name = `Edit ${this.number}`;
    this.ended = ENDED.includes(state);
    if (state === "painting") this.calls.announce(`${name} is being painted.`);
    if (this.ended) {
      this.find(".progress").hidden = true;
      this.find(".forget").textContent = "Remove";
      this.calls.announce(`${name} ${{ done: "is done", cancelled: "is cancelled", failed: `has failed: ${error}` }[state]}.`);
      if (state === "cancelled") this.find(".told").textContent += " · cancelled";
      for (const tile of this.tiles) tile.item.hidden = tile.button.disabled || this.tiles.length === 1;
      if (!this.last.results.length) this.find(".compare").hidden = true;
    }
    if (state === "done") this.#choose(this.chosen);
    this.calls.changed();
  }

  #pace(text) { this.find(".pace").textContent = text; }

  #lost(problem, forGood) {
    this.find(".error").textContent = problem;
    if (!forGood) return;
    this.ended = true;
    this.find(".progress").hidden = true;
    this.find(".forget").textContent = "Remove";
    this.calls.changed();
  }

  #tile(seed, place) {
    const item = document.createElement("li"), button = document.createElement("button");
    const frame = document.createElement("span"), image = document.createElement("img"), name = document.createElement("span");
    frame.className = "frame";
    name.className = "name";
    name.textContent = `seed ${seed}`;
    image.alt = "";
    image.hidden = true;
    frame.append(image);
    button.type = "button";
    button.disabled = true;
    button.append(frame, name);
    button.addEventListener("click", () => { this.chosenByHand = true; this.#choose(place); });
    item.append(button);
    return { item, button, image };
  }

  #result({ url }, place) {
    const { button, image } = this.tiles[place];
    if (!button.disabled) return;
    button.disabled = false;
    image.hidden = false;
    image.src = `${url}?most=${SMALL}`;
  }

  /** The newest preview, in its tile and beside the original. One is loaded at a time; those that come meanwhile are skipped. */
  async #preview({ previews, seed_number: seed }) {
    if (previews <= this.previews || this.loading) return;
    this.previews = previews;
    this.loading = true;
    const address = `/api/edits/${this.edit.id}/preview?n=${previews}`;
    try {
      if (!this.chosenByHand) await this.compare.show(address);
      const tile = this.tiles[seed ?? 0];
      if (tile.button.disabled) { tile.image.src = address; tile.image.hidden = false; }
      this.element.dataset.seen = previews;
    } catch {
      // It was painted and gone before it came.
    } finally {
      this.loading = false;
    }
    if (this.last.state === "painting") this.#preview(this.last);
    else if (this.last.state === "done") this.#choose(this.chosen);
  }

  async #choose(place) {
    const { results, state } = this.last, result = results[place];
    if (!result) return;
    this.chosen = place;
    this.tiles.forEach(({ button }, number) => button.setAttribute("aria-pressed", number === place));
    const stem = this.edit.photo.name.replace(/\.[^.]*$/, "") || "photo", base = `/api/edits/${this.edit.id}`;
    this.#link(".save", result.url, `${stem}-edited-${result.seed}.png`);
    this.#link(".mask", `${base}/mask`, `${stem}-mask.png`);
    this.#link(".record", `${base}/settings`, "settings.json");
    this.#link(".archive", `${base}/archive`, `${stem}-edit.zip`);
    this.find(".downloads").hidden = state !== "done";
    try {
      await this.compare.show(`${result.url}?most=${SMALL}`);
    } catch {
      this.find(".error").textContent = "The result could not be loaded: the server may have forgotten it; paint it again.";
    }
  }

  #link(selector, address, name) {
    Object.assign(this.find(selector), { href: address, download: name });
  }

  async #further() {
    const { url, seed } = this.last.results[this.chosen];
    this.find(".error").textContent = "";
    try {
      await this.calls.further(url, `${this.edit.photo.name.replace(/\.[^.]*$/, "")}-edited-${seed}.png`);
    } catch (error) {
      this.find(".error").textContent = error.message;
    }
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
