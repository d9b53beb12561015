/** A photo before and after, one over the other, with a line between them that a slider, a finger or a mouse moves. */
export class Compare {
  /**
   * @param {HTMLElement} element of the template @param {{width: number, height: number}} photo
   * @param {string} before its address @param {number} line where it begins, 0-100
   */
  constructor(element, photo, before, line) {
    this.element = element;
    this.pair = element.querySelector(".pair");
    this.after = element.querySelector(".after");
    this.slider = element.querySelector("input");
    const shape = photo.width / photo.height;
    this.pair.style.aspectRatio = `${photo.width} / ${photo.height}`;
    // As wide as there is room; not higher than the window; a tiny photo not as if it were a large one.
    this.pair.style.width = `min(100vw, ${68 * shape}vh, max(${photo.width}px, 30rem))`;
    element.querySelector(".before").src = before;
    this.slider.addEventListener("input", () => this.move(Number(this.slider.value)));
    this.pair.addEventListener("pointerdown", (event) => {
      this.pair.setPointerCapture(event.pointerId);
      this.#follow(event);
      event.preventDefault();
    });
    this.pair.addEventListener("pointermove", (event) => { if (event.buttons) this.#follow(event); });
    this.move(line);
  }

  /** Show a picture as the result. @param {string} address */
  async show(address) {
    // What is there stays until the next one can be shown: no flicker.
    const image = new Image();
    image.src = address;
    await image.decode();
    this.after.src = address;
    this.element.hidden = false;
  }

  /** @param {number} line 0-100: what is left of it is the original */
  move(line) {
    this.slider.value = line;
    this.slider.setAttribute("aria-valuetext", `${Math.round(line)} % original, ${Math.round(100 - line)} % result`);
    this.after.style.clipPath = `inset(0 0 0 ${line}%)`;
    this.pair.querySelector(".line").style.left = `${line}%`;
  }

  #follow(event) {
    const { left, width } = this.pair.getBoundingClientRect();
    this.move(Math.min(100, Math.max(0, (100 * (event.clientX - left)) / width)));
  }
}
