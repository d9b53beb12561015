/** The server's HTTP API. What it refuses is an `Error` whose message is the sentence that the server says. */

const INTERRUPTED = "The connection to the server is interrupted, and tried again: see whether `pbe app` still runs.";
const FORGOTTEN = "The server no longer knows this edit (was it started anew?): paint it again.";
const NO_ANSWER = "The server does not answer: see whether `pbe app` still runs, then try again.";

export const getModels = () => ask("GET", "/api/models");

/**
 * Send a photo, of any kind.
 * @param {Blob} file @param {string} name shown to people, never a path @param {number} limit bytes
 * @returns {Promise<{id: string, name: string, width: number, height: number}>}
 */
export function sendPhoto(file, name, limit = Infinity) {
  if (file.size > limit) {
    const sizes = `the file has ${megabytes(file.size)} MB, and at most ${megabytes(limit)} MB are taken`;
    throw new Error(`${name}: ${sizes}; give a smaller one.`);
  }
  return ask("POST", "/api/photos", file, { "X-Name": encodeURIComponent(name) });
}

/** Send a mask file for a photo. @returns {Promise<{id: string, width: number, height: number, share: number}>} */
export const sendMask = (file, photo) => ask("POST", `/api/masks?photo=${photo}`, file);

export const forgetPhoto = (id) => ask("DELETE", `/api/photos/${id}`);

/** Ask for an edit. @returns {Promise<{id: string, place: number}>} */
export const startEdit = (edit) => ask("POST", "/api/edits", JSON.stringify(edit), { "Content-Type": "application/json" });

/** This browser's edits that the server still has, oldest first, each with what was asked for. @returns {Promise<object[]>} */
export const getEdits = async () => (await ask("GET", "/api/edits")).edits;

/** How it stands with an edit. @returns {Promise<object>} as `followEdit` tells it */
export const getEdit = (id) => ask("GET", `/api/edits/${id}`);

export const forgetEdit = (id) => ask("DELETE", `/api/edits/${id}`);

/** Bytes of an address of the server's. @returns {Promise<Blob>} */
export async function getBlob(url) {
  const answer = await send(url, {});
  if (!answer.ok) throw await refusal(answer);
  return answer.blob();
}

/**
 * Follow an edit until it has ended.
 * @param {string} id @param {(state: object) => void} tell called with each state
 * @param {(problem: string, forGood: boolean) => void} lose called when the server does not tell any more, or not for now
 * @returns {() => void} stops to follow
 */
export function followEdit(id, tell, lose) {
  const events = new EventSource(`/api/edits/${id}/events`);
  events.onmessage = (event) => {
    const state = JSON.parse(event.data);
    if (["done", "cancelled", "failed"].includes(state.state)) events.close();
    tell(state);
  };
  // Browsers try again by themselves, unless the answer was a refusal.
  events.onerror = () => {
    const forGood = events.readyState === EventSource.CLOSED;
    lose(forGood ? FORGOTTEN : INTERRUPTED, forGood);
  };
  return () => events.close();
}

async function ask(method, url, body, headers = {}) {
  const kind = body instanceof Blob && { "Content-Type": "application/octet-stream" };
  const answer = await send(url, { method, body, headers: { "X-PBE": "1", ...kind, ...headers } });
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : answer.json().catch(() => null);
}

async function send(url, options) {
  try {
    return await fetch(url, { ...options, credentials: "same-origin" });
  } catch {
    throw new Error(NO_ANSWER);
  }
}

async function refusal(answer) {
  const said = await answer.json().catch(() => ({}));
  const told = `The server answers ${answer.status} ${answer.statusText}`;
  return new Error(said.error ?? `${told}: try again, or look at what it prints.`);
}

const megabytes = (bytes) => (bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
