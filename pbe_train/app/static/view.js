/**
 * Which part of a photo a stage shows: pure functions over {scale, left, top}.
 *
 * @typedef {{scale: number, left: number, top: number}} View scale: px of the screen for a px of the photo; left, top: where the
 *     photo's corner lies in the stage, px of the screen
 * @typedef {{width: number, height: number}} Size
 */

const MOST = 32; // Px of the screen for a px of the photo.
const MARGIN = 8; // Around a photo that fits, px of the screen.

/** The whole photo in the stage's middle. @param {Size} photo @param {Size} stage @returns {View} */
export function fit(photo, stage) {
  const room = (length) => Math.max(1, length - 2 * MARGIN);
  const scale = Math.min(room(stage.width) / photo.width, room(stage.height) / photo.height);
  return { scale, left: (stage.width - scale * photo.width) / 2, top: (stage.height - scale * photo.height) / 2 };
}

/** Closer (factor > 1) or farther, with the stage's point (x, y) staying where it is; never smaller than the whole photo. */
export function zoom(view, factor, x, y, photo, stage) {
  const least = fit(photo, stage).scale;
  const scale = Math.min(Math.max(MOST, least), Math.max(least, view.scale * factor));
  const rate = scale / view.scale;
  return keep({ scale, left: x - (x - view.left) * rate, top: y - (y - view.top) * rate }, photo, stage);
}

/** Moved by px of the screen. */
export function pan(view, right, down, photo, stage) {
  return keep({ scale: view.scale, left: view.left + right, top: view.top + down }, photo, stage);
}

/** Moved as little as shows a point of the photo, with some room around it. */
export function reveal(view, point, photo, stage) {
  const need = (at, length) => {
    const room = Math.min(40, length / 4);
    return at < room ? room - at : Math.min(0, length - room - at);
  };
  const right = need(view.left + point.x * view.scale, stage.width), down = need(view.top + point.y * view.scale, stage.height);
  return right || down ? pan(view, right, down, photo, stage) : view;
}

/** A point of the stage in px of the photo. */
export function toPhoto(view, x, y) {
  return [(x - view.left) / view.scale, (y - view.top) / view.scale];
}

/** No empty room where the photo could be: what is smaller than the stage is centred, what is larger covers it. */
function keep(view, photo, stage) {
  const place = (start, length, room) => {
    if (length <= room - 2 * MARGIN) return (room - length) / 2;
    return Math.min(MARGIN, Math.max(room - length - MARGIN, start));
  };
  return {
    scale: view.scale,
    left: place(view.left, photo.width * view.scale, stage.width),
    top: place(view.top, photo.height * view.scale, stage.height),
  };
}
