/**
 * Masks as PNG files of one bit a pixel, and back. A canvas could write them, too, but needs four bytes a pixel for it, and
 * phones have none of 24 million pixels.
 */
import { packBits } from "./mask.js";

const SIGNATURE = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
const ROWS = 256; // Of a strip that is drawn to be read.

/**
 * A mask as a PNG file, black (0) and white (1, repaint). Source: PNG specification, third edition (W3C 2025), sections 5 and 11.
 * @param {import("./mask.js").Mask} mask @returns {Promise<Blob>}
 */
export async function maskToPng({ data, width, height }) {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header[8] = 1; // Bits a pixel; all else 0: greyscale, deflate, no interlacing.
  const rows = packBits(data, width, 0, 0, width, height, 1); // Before each row stands its filter, 0: none.
  const packed = new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate")));
  const body = new Uint8Array(await packed.arrayBuffer());
  const parts = [SIGNATURE, chunk("IHDR", header), chunk("IDAT", body), chunk("IEND", new Uint8Array(0))];
  return new Blob(parts, { type: "image/png" });
}

/**
 * What a picture of black and white holds: 1 where it is white. Read in strips, for the memory.
 * @param {ImageBitmap} picture @param {Uint8Array} data where it goes, of the picture's size
 */
export function readMask(picture, data) {
  const { width, height } = picture;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.min(ROWS, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (let top = 0; top < height; top += ROWS) {
    const rows = Math.min(ROWS, height - top);
    context.drawImage(picture, 0, top, width, rows, 0, 0, width, rows);
    const { data: colours } = context.getImageData(0, 0, width, rows);
    for (let at = 0; at < width * rows; at++) data[top * width + at] = colours[4 * at] > 127 ? 1 : 0;
  }
}

function chunk(kind, body) {
  const bytes = new Uint8Array(12 + body.length), view = new DataView(bytes.buffer);
  view.setUint32(0, body.length);
  bytes.set([...kind].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(body, 8);
  view.setUint32(8 + body.length, checksum(bytes.subarray(4, 8 + body.length)));
  return bytes;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit++) number = number & 1 ? 0xedb88320 ^ (number >>> 1) : number >>> 1;
  return number;
});

function checksum(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}
