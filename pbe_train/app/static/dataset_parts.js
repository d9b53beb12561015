/** Small parts of the viewer's page. Texts of datasets come from strangers: they are only ever set as text. */

/**
 * An element.
 * @param {string} tag @param {object} [properties] set as properties, or with `aria-` and `data-` as attributes
 * @param {...(Node|string|null|false)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== false));
  return element;
}

/** An element of SVG. @param {string} tag @param {object} attributes @param {...Node} children */
export function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A link to another site, which learns nothing of this page. @param {string|null} url @param {string} text */
export function outside(url, text) {
  return url ? make("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, text) : text;
}

export const counted = (number) => number.toLocaleString("en");

/** A number with its noun. @param {number} number @param {string} one @param {string} [many] */
export const numberOf = (number, one, many = `${one}s`) => `${counted(number)} ${number === 1 ? one : many}`;

/** A share in percent, of three digits. @param {number} share */
export const percent = (share) => `${(100 * share).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;

/** Bytes, for people. @param {number} bytes */
export const size = (bytes) => (bytes < 1000 ? `${bytes} B` : `${(bytes / 1000).toLocaleString("en", { maximumFractionDigits: 1 })} kB`);
