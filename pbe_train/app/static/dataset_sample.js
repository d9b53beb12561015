/** One sample with everything, in a dialog. Pictures that a network makes are asked for when they are first wanted, then for each sample. */

import { address, getJson, getPicture } from "./dataset_api.js";
import { counted, draw, make, outside, percent, size } from "./dataset_parts.js";

const DRAWS = 8;
const ORIGINS = { "view.jpg": "view.jpg", photo: "view, cut from the photo again", latent: "view, decoded from its latent: the photo is not here" };

export class SampleDialog {
  /**
   * @param {HTMLDialogElement} dialog
   * @param {{mark: (what: string, id: string, leave: boolean) => Promise<void>, isMarked: (what: string, id: string) => boolean,
   *   move: (steps: number) => void}} actions
   */
  constructor(dialog, actions) {
    Object.assign(this, { dialog, actions, mask: -1, latent: false, drawn: false, boxed: true });
    this.draws = { preset: "paper", geometry: "squash", seed: 0, step: 0 };
    this.urls = [];
    dialog.addEventListener("close", () => this.leave());
    dialog.addEventListener("keydown", (event) => this.pressed(event));
  }

  /** @param {{number: number, build: string}} dataset @param {object} row of the grid @param {string} told where it is among others */
  async show(dataset, row, told) {
    this.leave();
    this.stop = new AbortController();
    const { signal } = this.stop;
    Object.assign(this, { dataset, row, told, facts: null });
    this.body = make("div", { className: "body", tabIndex: -1 }, make("p", { className: "quiet" }, "reading the sample"));
    this.dialog.replaceChildren(this.head(), this.body);
    if (!this.dialog.open) this.dialog.showModal();
    this.body.focus();
    try {
      const facts = await getJson(address(dataset.number, `samples/${row.place}`), signal);
      if (signal.aborted) return;
      this.facts = facts;
      if (this.mask >= facts.record.mask_kinds.length) this.mask = -1;
      this.body.replaceChildren(this.pictures(), this.drawsPart(), this.factGroups());
    } catch (problem) {
      if (problem.name !== "AbortError") this.body.replaceChildren(make("p", { className: "error", role: "alert" }, problem.message));
    }
  }

  leave() {
    this.stop?.abort();
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
  }

  head() {
    const { row } = this;
    const button = (text, title, action) => make("button", { type: "button", title, onclick: action }, text);
    this.marks = Object.fromEntries([["object", row.object_id], ["photo", photoOf(row.object_id)]].map(([what, id]) => {
      const mark = button(`Leave out ${what}`, `${what === "object" ? "o" : "p"}: selection leaves out ${id}`, () => this.toggle(what, id));
      return [what, mark];
    }));
    this.showMarks();
    return make("header", {},
      make("h2", { id: "sample-title" }, row.label_name, make("small", {}, `${this.told} · ${row.split} · ${row.key}`)),
      make("div", { className: "buttons" }, this.marks.object, this.marks.photo),
      make("div", { className: "buttons" },
        make("button", { type: "button", title: "The one before (←)", "aria-label": "The sample before", onclick: () => this.actions.move(-1) }, "←"),
        make("button", { type: "button", title: "The next (→)", "aria-label": "The next sample", onclick: () => this.actions.move(1) }, "→"),
        button("Close", "Esc", () => this.dialog.close())));
  }

  showMarks() {
    for (const [what, id] of [["object", this.row.object_id], ["photo", photoOf(this.row.object_id)]]) {
      const marked = this.actions.isMarked(what, id);
      this.marks[what].setAttribute("aria-pressed", marked);
      this.marks[what].textContent = marked ? `Left out: ${what}` : `Leave out ${what}`;
    }
  }

  async toggle(what, id) {
    try {
      await this.actions.mark(what, id, !this.actions.isMarked(what, id));
      this.showMarks();
    } catch (problem) {
      this.body.prepend(make("p", { className: "error", role: "alert" }, problem.message));
    }
  }

  /** A picture of the sample, laid into a frame. @param {string} what @param {object} [query] @param {string} [alt] @param {(from: string) => void} [tell] */
  picture(what, query = {}, alt = "", tell = () => {}) {
    const frame = make("div", { className: "laid" });
    const { signal } = this.stop;
    getPicture(address(this.dataset.number, `samples/${this.row.place}/${what}`, { ...query, build: this.dataset.build }), signal).then(({ data, from }) => {
      if (signal.aborted) return;
      tell(from);
      const url = URL.createObjectURL(data);
      this.urls.push(url);
      const image = make("img", { src: url, alt });
      image.onload = () => frame.classList.toggle("small", image.naturalWidth < 200);
      frame.prepend(image);
    }).catch((problem) => {
      if (problem.name !== "AbortError") frame.replaceChildren(make("p", { className: "problem" }, problem.message));
    });
    return frame;
  }

  pictures() {
    const { record } = this.facts;
    const [width, height] = record.photo_size;
    const [left, top, across, down = across] = record.window;
    const box = [record.box[0], record.box[1], record.box[2] - record.box[0], record.box[3] - record.box[1]];
    const [x0, y0, x1, y1] = record.reference_window;
    const photo = this.picture("photo", {}, `photo ${record.photo_id}`);
    photo.append(lines(width, height, [["of-window", [left, top, across, down]], ["of-box", box], ["of-reference", [x0, y0, x1 - x0, y1 - y0]]]));
    const parts = make("div", { className: "pictures" },
      figure(photo, "photo: box (pink), window of the view (white), reference (yellow, dashed)"),
      this.viewFigure(),
      this.latentFigure(),
      figure(this.picture("reference", {}, "reference"), `reference${this.facts.outline ? ", whose outline is known" : ""}`),
      ...(record.references ?? []).map((other, place) =>
        figure(this.picture(`reference/${place + 1}`, {}, `reference of photo ${other.photo_id}`), `reference of photo ${other.photo_id}`)));
    return parts;
  }

  viewFigure() {
    const { record, view_shape: [wide, high], mask_shares: shares } = this.facts;
    const caption = make("figcaption", {}, "view");
    const frame = this.picture("view", {}, "view", (from) => (caption.textContent = `${ORIGINS[from] ?? "view"}; ${wide === high ? wide : `${wide} × ${high}`} px`));
    const [x0, y0, x1, y1] = record.box_in_view;
    const boxed = lines(wide, high, [["of-box", [x0, y0, x1 - x0, y1 - y0]]]);
    let over = null;
    const show = () => {
      over?.remove();
      over = this.mask < 0 ? null : this.picture(`mask/${this.mask}`, {}, `mask ${this.mask}`);
      if (over) {
        over.classList.replace("laid", "over-view");
        frame.append(over);
      }
      frame.append(boxed);
    };
    const radio = (number, text) => make("label", {},
      make("input", { type: "radio", name: "mask", checked: this.mask === number, onchange: () => { this.mask = number; show(); } }), text);
    const masks = record.mask_kinds.map((kind, number) => radio(number, `${number}: ${kind}, ${percent(shares[number])}`));
    this.choices = make("fieldset", { className: "masks" }, make("legend", { className: "unseen" }, "Mask over the view"), radio(-1, "no mask"), ...masks);
    show();
    return make("figure", {}, frame, this.choices, caption);
  }

  latentFigure() {
    const holder = make("figure", {});
    const show = () => {
      this.latent = true;
      const which = this.mask < 0 ? "latent" : `masked/${this.mask}`;
      holder.replaceChildren(this.picture(which, {}, "decoded latent"),
        make("figcaption", {}, this.mask < 0 ? "latent, decoded by the VAE" : `latent of the view under mask ${this.mask}, decoded`));
    };
    const ask = make("button", { type: "button", onclick: () => { show(); this.body.focus({ preventScroll: true }); } }, "Decode the latent");
    holder.append(make("div", { className: "laid" }, make("p", { className: "problem" }, ask)), make("figcaption", {}, "latent; the first one loads the VAE"));
    if (this.latent) show();
    this.choices.addEventListener("change", () => this.latent && show());
    return holder;
  }

  drawsPart() {
    const strip = make("div", { className: "draws" });
    const show = () => {
      this.drawn = true;
      strip.replaceChildren(...Array.from({ length: DRAWS }, (_, slot) =>
        figure(this.picture(`draws/${slot}`, this.draws, `draw in slot ${slot}`), `slot ${slot}`)));
    };
    const set = (name, value) => { this.draws[name] = value; if (this.drawn) show(); };
    const choice = (name, values) => make("label", {}, name,
      make("select", { onchange: (event) => set(name, event.target.value) },
        ...values.map((value) => make("option", { value, selected: value === this.draws[name] }, value))));
    const number = (name) => make("label", {}, name,
      make("input", { type: "number", min: 0, step: 1, value: this.draws[name], onchange: (event) => {
        event.target.value = Math.max(0, Math.floor(event.target.valueAsNumber || 0));
        set(name, event.target.value);
      } }));
    const part = make("section", { className: "more" },
      make("h3", {}, "Draws of the augmentation"),
      make("p", { className: "quiet" }, "What the encoder sees of the reference in a training with this seed, were this sample in these slots of this step."),
      make("div", { className: "settings" },
        choice("preset", ["paper", "strong", "none"]), choice("geometry", ["squash", "pad"]), number("seed"), number("step"),
        make("button", { type: "button", onclick: show }, `Show ${DRAWS} draws`)),
      strip);
    if (this.drawn) show();
    return part;
  }

  factGroups() {
    const { record, members, shard, position, share } = this.facts;
    const corners = (box) => box.map((value) => Math.round(value * 10) / 10).join(", ");
    const object = {
      class: `${record.label_name} (${record.label})`,
      object: record.object_id,
      ...(record.group ? { group: record.group } : {}),
      "share of the photo": percent(share),
      box: `${corners(record.box)} px of the photo`,
      window: `left ${record.window[0]}, top ${record.window[1]}, side ${record.window[2]} px${record.padded ? "; reaches beyond the photo" : ""}`,
      "box in view": `${corners(record.box_in_view)} px`,
    };
    const photo = {
      photo: record.photo_id,
      file: record.file_name ?? "by its id",
      size: `${record.photo_size[0]} × ${record.photo_size[1]} px${record.rotation ? `, turned by ${record.rotation}°` : ""}`,
      author: record.author ?? "unknown",
      licence: record.licence ? outside(this.facts.licence_link, record.licence) : "unknown",
      link: record.url ? outside(this.facts.link, record.url) : "unknown",
      "SHA-256": record.photo_sha256,
    };
    const stored = {
      key: record.key,
      shard: `${shard}, position ${counted(position)}`,
      seed: String(record.seed),
      ...Object.fromEntries(Object.entries(members).map(([name, place]) => [name, `${size(place.length)} at ${counted(place.offset)}, CRC-32 ${place.crc32}`])),
    };
    return make("div", { className: "fact-groups" }, ...[["Object", object], ["Photo", photo], ["Stored", stored]].map(([title, facts]) =>
      make("section", {}, make("h3", {}, title), make("dl", { className: "facts" },
        ...Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])))));
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const keys = {
      ArrowLeft: () => this.actions.move(-1),
      ArrowRight: () => this.actions.move(1),
      o: () => this.marks.object.click(),
      p: () => this.marks.photo.click(),
      m: () => this.nextMask(),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  }

  nextMask() {
    const all = [...(this.choices?.querySelectorAll("input") ?? [])];
    if (!all.length) return;
    all[(all.findIndex((input) => input.checked) + 1) % all.length].click();
  }
}

/** The photo's id within an object's. @param {string} object */
export const photoOf = (object) => object.slice(0, object.lastIndexOf("-"));

function figure(picture, text) {
  return make("figure", {}, picture, make("figcaption", {}, text));
}

/** Rectangles over a picture. @param {number} width @param {number} height px of the picture @param {[string, number[]][]} boxes */
export function lines(width, height, boxes) {
  const of = (kind, [x, y, w, h]) => draw("rect", { class: kind, x, y, width: w, height: h });
  const drawn = boxes.flatMap(([kind, box]) => [of("dark", box), of(kind, box)]);
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...drawn);
}
