/** The dialog in which one drags a rectangle on a photo (the edited one, or another one) to make a reference of it. */
import { sendPhoto } from "./api.js";
import { Picture } from "./pictures.js";
import { Stage } from "./stage.js";
import { Frame } from "./tools.js";

export class Cutter {
  /** @param {{bytes: number}} limits @param {(file: File) => Promise<void>} use takes what was cut out */
  constructor(limits, use) {
    const find = (name) => document.querySelector(`#cut${name}`);
    Object.assign(this, { limits, use, dialog: find(""), button: find("-use") });
    for (const name of ["error", "told", "from", "file"]) this[name] = find(`-${name}`);
    this.edited = null;
    this.pictures = new Map();
    this.frame = new Frame((bounds) => this.#framed(bounds));
    this.stage = new Stage(find("-stage"), this.frame);
    this.from.addEventListener("change", () => this.#show(this.pictures.get(this.from.value)));
    this.button.addEventListener("click", () => this.#cut());
    find("-file-open").addEventListener("click", () => this.file.click());
    find("-close").addEventListener("click", () => this.dialog.close());
    // Escape gives up the rectangle first, and closes then.
    this.dialog.addEventListener("cancel", (event) => { if (this.stage.stop()) event.preventDefault(); });
    this.file.addEventListener("change", () => { this.#openFile(this.file.files[0]); this.file.value = ""; });
    for (const kind of ["dragover", "drop"]) {
      this.dialog.addEventListener(kind, (event) => {
        event.preventDefault();
        event.stopPropagation();
        if (kind === "drop" && event.dataTransfer.files.length) this.#openFile(event.dataTransfer.files[0]);
      });
    }
  }

  /** @param {?Picture} edited the photo that is edited, first in the list */
  open(edited) {
    this.error.textContent = "";
    this.edited = edited;
    if (edited && !this.pictures.has(edited.id)) this.#list(edited);
    this.dialog.showModal();
    this.#show(edited ?? [...this.pictures.values()].at(-1) ?? null);
  }

  #list(picture) {
    this.pictures.set(picture.id, picture);
    this.from.add(new Option(picture.name, picture.id));
  }

  #show(picture) {
    this.frame.photo = picture;
    this.frame.clear();
    if (picture) this.from.value = picture.id;
    this.from.parentElement.hidden = !picture;
    if (this.stage.picture !== this.edited) this.stage.picture?.rest();
    this.stage.show(picture);
    this.#framed(null);
  }

  #framed(bounds) {
    this.button.disabled = !bounds;
    this.told.textContent = bounds ? `${bounds.right - bounds.left} × ${bounds.bottom - bounds.top} px` : this.frame.photo ? "No rectangle yet." : "";
  }

  async #openFile(file) {
    if (!file) return;
    this.error.textContent = "";
    try {
      const picture = await new Picture(await sendPhoto(file, file.name, this.limits.bytes)).open();
      this.#list(picture);
      this.#show(picture);
    } catch (error) {
      this.error.textContent = error.message;
    }
  }

  async #cut() {
    this.error.textContent = "";
    this.button.disabled = true;
    try {
      const part = await this.stage.picture.cut(this.frame.bounds);
      const stem = this.stage.picture.name.replace(/\.[^.]*$/, "");
      await this.use(new File([part], `${stem}-part.png`, { type: "image/png" }));
      this.dialog.close();
    } catch (error) {
      this.error.textContent = error.message;
    } finally {
      this.button.disabled = !this.frame.bounds;
    }
  }
}
