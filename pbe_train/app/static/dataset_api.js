/** The server's API of datasets. What it refuses is an `Error` whose message is the sentence that the server says. */

const NO_ANSWER = "The server does not answer: see whether `pbe app` still runs, then try again.";

/** What is asked for with a dataset and filters, as a URL. @param {number} dataset @param {string} what @param {object} query */
export function address(dataset, what, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const words = new URLSearchParams(given).toString();
  return `/api/datasets/${dataset}${what ? `/${what}` : ""}${words ? `?${words}` : ""}`;
}

/** @param {string} url @param {AbortSignal} [signal] @returns {Promise<any>} */
export async function getJson(url, signal) {
  return (await ask(url, { signal })).json();
}

/** A picture's bytes, and what it was made from, where that is told. @param {string} url @param {AbortSignal} [signal] @returns {Promise<{data: Blob, from: string}>} */
export async function getPicture(url, signal) {
  const answer = await ask(url, { signal });
  return { data: await answer.blob(), from: answer.headers.get("X-Made-From") ?? "" };
}

/** Mark an object or photo to be left out, or take the mark away. @param {{what: string, id: string, leave: boolean}} mark */
export async function sendMark(mark) {
  const headers = { "X-PBE": "1", "Content-Type": "application/json" };
  return (await ask("/api/left-out", { method: "POST", headers, body: JSON.stringify(mark) })).json();
}

async function ask(url, options) {
  let answer;
  try {
    answer = await fetch(url, { ...options, credentials: "same-origin" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(NO_ANSWER);
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answers ${answer.status} ${answer.statusText}: try again, or look at what it prints.`);
}
