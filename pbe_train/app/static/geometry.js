/**
 * Shapes of a mask, exactly: which pixels of a photo a stroke, a box or a lasso covers. Pure functions, hard edges.
 *
 *     points (x, y) in px of the photo, in eighths ──shape──▶ {bounds, spans} ──mask.js──▶ pixels
 *
 * A pixel (column, row) is covered where its centre (column + 0.5, row + 0.5) lies in the shape. All is done in doubles, in the
 * order written here, so that another program that follows it (the tests do) finds the same pixels, bit for bit.
 *
 * @typedef {{x: number, y: number}} Point in px of the photo, origin at its top left corner
 * @typedef {{left: number, top: number, right: number, bottom: number}} Bounds whole px; right and bottom are beyond it
 * @typedef {(row: number, start: number, end: number) => void} Span columns start <= x < end of a row
 * @typedef {{bounds: Bounds, spans: (span: Span) => void}} Shape
 */

/** A point in eighths of a px: finer than a pointer, and coarse enough that squares of lengths are exact. @returns {Point} */
export function snap(x, y) {
  return { x: Math.round(x * 8) / 8, y: Math.round(y * 8) / 8 };
}

/**
 * One piece of a stroke: all pixels whose centre is no farther than `radius` from the line from `from` to `to` (a disc, if both
 * are one point).
 * @param {Point} from @param {Point} to @param {number} radius px @param {number} width of the photo @param {number} height
 * @returns {Shape}
 */
export function capsule(from, to, radius, width, height) {
  const bounds = clip(
    Math.floor(Math.min(from.x, to.x) - radius), Math.floor(Math.min(from.y, to.y) - radius),
    Math.ceil(Math.max(from.x, to.x) + radius), Math.ceil(Math.max(from.y, to.y) + radius), width, height);
  return { bounds, spans: (span) => {
    for (let row = bounds.top; row < bounds.bottom; row++) {
      let [start, end] = guessSpan(from, to, radius, row);
      start = Math.max(bounds.left, start);
      end = Math.min(bounds.right, end);
      // The shape is convex: a row holds one span. The guess is a px too wide at most, and the rule itself has the last word.
      while (start < end && !inCapsule(from, to, radius, start, row)) start++;
      while (start < end && !inCapsule(from, to, radius, end - 1, row)) end--;
      if (start < end) span(row, start, end);
    }
  } };
}

/** Whether the centre of a pixel is in a capsule: the rule that `capsule` follows. */
export function inCapsule(from, to, radius, column, row) {
  const x = column + 0.5 - from.x, y = row + 0.5 - from.y;
  const alongX = to.x - from.x, alongY = to.y - from.y;
  const length = alongX * alongX + alongY * alongY; // Squared, as all here.
  const along = x * alongX + y * alongY;
  if (along <= 0) return x * x + y * y <= radius * radius;
  if (along >= length) return (x - alongX) * (x - alongX) + (y - alongY) * (y - alongY) <= radius * radius;
  const across = x * alongY - y * alongX;
  return across * across <= radius * radius * length;
}

/** Columns that hold all of a capsule's in a row, and up to a px more at each end. */
function guessSpan(from, to, radius, row) {
  let least = Infinity, most = -Infinity;
  const take = (x) => { least = Math.min(least, x); most = Math.max(most, x); };
  const y = row + 0.5;
  for (const end of [from, to]) {
    const rest = radius * radius - (y - end.y) * (y - end.y);
    if (rest < 0) continue;
    take(end.x - Math.sqrt(rest));
    take(end.x + Math.sqrt(rest));
  }
  // Corners of the band between the discs, and where the row meets its sides.
  const length = Math.hypot(to.x - from.x, to.y - from.y);
  if (length > 0) {
    const offX = (radius * (to.y - from.y)) / length, offY = (radius * (from.x - to.x)) / length;
    for (const sign of [1, -1]) {
      const a = { x: from.x + sign * offX, y: from.y + sign * offY }, b = { x: to.x + sign * offX, y: to.y + sign * offY };
      if (y < Math.min(a.y, b.y) || y > Math.max(a.y, b.y)) continue;
      take(a.y === b.y ? a.x : a.x + ((y - a.y) * (b.x - a.x)) / (b.y - a.y));
    }
  }
  return least > most ? [0, 0] : [Math.floor(least - 0.5), Math.ceil(most + 0.5) + 1];
}

/** All pixels whose centre is in a rectangle that two points span. @returns {Shape} */
export function box(one, other, width, height) {
  const first = (value) => Math.ceil(value - 0.5); // The first pixel whose centre is not before it.
  const bounds = clip(
    first(Math.min(one.x, other.x)), first(Math.min(one.y, other.y)),
    first(Math.max(one.x, other.x)), first(Math.max(one.y, other.y)), width, height);
  return { bounds, spans: (span) => {
    if (bounds.left >= bounds.right) return;
    for (let row = bounds.top; row < bounds.bottom; row++) span(row, bounds.left, bounds.right);
  } };
}

/**
 * All pixels whose centre is in a closed polygon, also where it overlaps itself (winding number other than 0).
 * @param {Point[]} points @returns {Shape}
 */
export function polygon(points, width, height) {
  const xs = points.map((point) => point.x), ys = points.map((point) => point.y);
  const bounds = clip(
    Math.floor(least(xs)), Math.floor(least(ys)), Math.ceil(-least(xs.map((x) => -x))), Math.ceil(-least(ys.map((y) => -y))),
    width, height);
  return { bounds, spans: (span) => {
    for (let row = bounds.top; row < bounds.bottom; row++) {
      let winding = 0, start = 0;
      for (const [x, turn] of crossings(points, row + 0.5)) {
        if (winding === 0) start = x;
        winding += turn;
        if (winding !== 0) continue;
        const from = Math.max(bounds.left, Math.ceil(start - 0.5)), to = Math.min(bounds.right, Math.ceil(x - 0.5));
        if (from < to) span(row, from, to);
      }
    }
  } };
}

/** Where a polygon's edges meet a horizontal line, from left to right, with the turn that each adds: 1 downwards, -1 upwards. */
function crossings(points, y) {
  const found = [];
  points.forEach((a, number) => {
    const b = points[(number + 1) % points.length];
    if ((a.y <= y) === (b.y <= y)) return;
    found.push([a.x + ((y - a.y) * (b.x - a.x)) / (b.y - a.y), a.y <= y ? 1 : -1]);
  });
  return found.sort((one, other) => one[0] - other[0]);
}

// Not Math.min(...values): a lasso may have more points than a function takes arguments.
function least(values) {
  return values.reduce((one, other) => Math.min(one, other), Infinity);
}

/** @returns {Bounds} within the photo */
function clip(left, top, right, bottom, width, height) {
  const within = (value, most) => Math.min(most, Math.max(0, value));
  return { left: within(left, width), top: within(top, height), right: within(right, width), bottom: within(bottom, height) };
}

/** The smallest bounds around two. @param {?Bounds} one @param {?Bounds} other @returns {?Bounds} */
export function union(one, other) {
  if (!one || !other) return one ?? other;
  return {
    left: Math.min(one.left, other.left), top: Math.min(one.top, other.top),
    right: Math.max(one.right, other.right), bottom: Math.max(one.bottom, other.bottom),
  };
}
