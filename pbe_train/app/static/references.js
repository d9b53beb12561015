/** The photos of what to paint: thumbnails that can be removed. */
import { forgetPhoto, sendPhoto } from "./api.js";

const LEAST_SIDE = 8; // Px, where the server does not say.

export class References {
  /** @param {HTMLElement} panel @param {{bytes: number, references: number}} limits @param {() => void} changed */
  constructor(panel, limits, changed) {
    this.list = panel.querySelector(".thumbs");
    this.error = panel.querySelector(".error");
    this.limits = limits;
    this.changed = changed;
    this.photos = [];
  }

  get ids() { return this.photos.map((photo) => photo.id); }

  /** Send files to the server and show them. What is refused is told of, and the others are taken. @param {File[]} files */
  async add(files) {
    const problems = [];
    for (const file of files) {
      try {
        const most = this.limits.references;
        if (this.photos.length >= most) throw new Error(`At most ${most} references are taken: remove one first.`);
        this.#show(this.#checked(await sendPhoto(file, file.name || "pasted.png", this.limits.bytes)));
      } catch (error) {
        problems.push(error.message);
      }
    }
    this.tell(problems.join(" "));
  }

  tell(problem) { this.error.textContent = problem; }

  #checked(photo) {
    const least = this.limits.reference_side ?? LEAST_SIDE;
    if (Math.min(photo.width, photo.height) >= least) return photo;
    forgetPhoto(photo.id).catch(() => {});
    throw new Error(
      `${photo.name}: ${photo.width} × ${photo.height} px show too little of anything; give a photo of what to paint, at least ` +
      `${least} px wide and high.`);
  }

  #show(photo) {
    const item = document.createElement("li"), image = document.createElement("img"), button = document.createElement("button");
    image.src = `/api/photos/${photo.id}?most=320`;
    image.alt = photo.name;
    item.title = `${photo.name}, ${photo.width} × ${photo.height} px`;
    button.type = "button";
    button.textContent = "×";
    button.setAttribute("aria-label", `Remove ${photo.name}`);
    button.addEventListener("click", () => this.#remove(photo, item));
    item.append(image, button);
    this.list.append(item);
    this.photos.push(photo);
    this.changed();
  }

  #remove(photo, item) {
    this.photos = this.photos.filter((one) => one !== photo);
    item.remove();
    this.tell("");
    // What the server keeps of it goes by itself if this fails.
    forgetPhoto(photo.id).catch(() => {});
    this.changed();
    (this.list.querySelector("button") ?? document.querySelector("#reference-open")).focus();
  }
}
