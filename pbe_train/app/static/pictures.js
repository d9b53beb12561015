/** Pictures of photos that the server keeps: a small one at once, the full one when one looks closely or cuts something out. */

/** Long side of the small one, px. A stage is seldom wider. */
export const SMALL = 1600;

export class Picture {
  /** @param {{id: string, name: string, width: number, height: number}} photo as the server tells of it */
  constructor(photo) {
    Object.assign(this, photo);
    this.small = null;
    this.full = null;
    this.asked = null;
  }

  url(most) { return `/api/photos/${this.id}${most ? `?most=${most}` : ""}`; }

  /** Load what is shown first. @returns {Promise<Picture>} */
  async open() {
    this.small = await loadImage(this.url(SMALL));
    if (this.small.naturalWidth >= this.width) this.full = this.small;
    return this;
  }

  /**
   * What to draw at a scale (px of the screen for one of the photo): the small picture, if need be, and `later` is called when a
   * better one is there.
   */
  at(scale, later) {
    if (!this.full && scale * this.width > 1.25 * this.small.naturalWidth) this.whole().then(later, () => {});
    return this.full ?? this.small;
  }

  /** All px of the photo. @returns {Promise<HTMLImageElement>} */
  whole() {
    this.asked ??= this.full ? Promise.resolve(this.full) : loadImage(this.url()).then((image) => (this.full = image));
    return this.asked;
  }

  /** Let the full picture go, which takes four bytes a pixel; it is loaded again if it is wanted. */
  rest() {
    if (this.full !== this.small) this.full = this.asked = null;
  }

  /** A part of the photo as a PNG file. @param {import("./geometry.js").Bounds} bounds @returns {Promise<Blob>} */
  async cut({ left, top, right, bottom }) {
    const image = await this.whole(), canvas = document.createElement("canvas");
    canvas.width = right - left;
    canvas.height = bottom - top;
    canvas.getContext("2d").drawImage(image, left, top, right - left, bottom - top, 0, 0, right - left, bottom - top);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

/** @returns {Promise<HTMLImageElement>} decoded; refused with a sentence where the server has it no more */
export async function loadImage(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error("The picture could not be loaded: the server may have forgotten it; open the photo again.");
  }
  return image;
}
