/**
 * The edit page: a photo, a mask drawn on it, references and settings go to the server, and results come back.
 *
 *     photo ──stage + tools──▶ mask ─┐
 *     references ────────────────────┼──▶ edit ──events──▶ results
 *     settings ──────────────────────┘
 */
import { getBlob, getEdits, getModels, sendMask, sendPhoto, startEdit } from "./api.js";
import { Cutter } from "./cut.js";
import { Mask, boundsOf } from "./mask.js";
import { Picture, loadImage } from "./pictures.js";
import { maskToPng, readMask } from "./png.js";
import { References } from "./references.js";
import { Results } from "./results.js";
import { Settings } from "./settings.js";
import { listenToKeys } from "./keys.js";
import { Stage } from "./stage.js";
import { MaskTools } from "./tools.js";

const find = (selector) => document.querySelector(selector);
const SIZES = 100; // Of the slider for the brush's size.

/** All that the page knows. */
const page = { offered: null, picture: null, mask: null, sent: null, opening: 0, missed: "" };

const tools = new MaskTools((bounds, whole) => {
  if (bounds) stage.maskChanged(bounds);
  if (whole) showMask();
});
const stage = new Stage(find("#stage"), tools, () => tools.name === "hand");
const results = new Results(find("#results"), { further: editFurther, announce, changed: showHint });
let references, settings, cutter;

await start();

async function start() {
  listen();
  try {
    page.offered = await getModels();
  } catch (error) {
    find("#photo-error").textContent = error.message;
    return;
  }
  const { limits, datasets } = page.offered;
  references = new References(find("#references"), limits, showHint);
  settings = new Settings(find("#settings"), page.offered);
  cutter = new Cutter(limits, async (file) => { await references.add([file]); announce("A reference is cut out."); });
  find("#to-dataset").hidden = !datasets.length;
  showMask();
  await attempt("#photo-error", showEarlierEdits);
  document.documentElement.dataset.ready = "yes";
}

/** Edits go on when a page is left or loaded again: show those that this browser has, or else nobody could cancel them. */
async function showEarlierEdits() {
  for (const { id, photo, ...asked } of await getEdits()) {
    results.add({ id, photo: new Picture(photo), seeds: asked.seeds, told: settings.told(asked), line: 0 }, false);
  }
}

/** Open a photo to edit. @param {Blob} file @param {string} name */
async function openPhoto(file, name) {
  const opening = ++page.opening;
  await attempt("#photo-error", async () => {
    find("#photo-told").textContent = `Opening ${name}…`;
    try {
      const picture = await new Picture(await sendPhoto(file, name, page.offered.limits.bytes)).open();
      if (opening !== page.opening) return; // Another one was opened meanwhile.
      page.picture?.rest();
      page.picture = picture;
      page.mask = tools.mask = new Mask(picture.width, picture.height);
      stage.show(picture, page.mask);
      resizeBrush(0.7 * SIZES);
      announce(`${picture.name} is open.`);
    } finally {
      showMask();
    }
  });
}

/** Take a mask from a file: the server reads it, by the rules of the command line. */
async function openMask(file) {
  await attempt("#photo-error", async () => {
    if (!page.picture) throw new Error("There is no photo yet: open the photo first, then its mask.");
    const mask = page.mask;
    const { id } = await sendMask(file, page.picture.id);
    // As bytes first: a mask is shown as it is, whatever colours a browser thinks of.
    const picture = await createImageBitmap(await getBlob(`/api/masks/${id}`), { colorSpaceConversion: "none" });
    if (mask === page.mask) changeMask(() => mask.changeAll((data) => readMask(picture, data)));
    picture.close();
  });
}

/** Go on with a result as the photo. */
async function editFurther(address, name) {
  await openPhoto(await getBlob(address), name);
  find("#editor").scrollIntoView({ block: "start" });
  find("#canvas").focus({ preventScroll: true });
}

async function openExample() {
  await attempt("#photo-error", async () => {
    const part = async (name) => new File([await getBlob(`/static/example/${name}.png`)], `${name}.png`, { type: "image/png" });
    const [photo, mask, reference] = await Promise.all(["photo", "mask", "reference"].map(part));
    await openPhoto(photo, photo.name);
    await openMask(mask);
    if (!references.photos.length) await references.add([reference]);
  });
}

async function paint() {
  const missing = whatIsMissing();
  const button = find("#paint");
  await attempt("#settings-error", async () => {
    page.missed = missing;
    if (missing) { showHint(); throw new Error(missing); }
    if (!find("#settings").reportValidity() || button.disabled) return;
    button.disabled = true;
    try {
      const asked = settings.read(), { picture, mask } = page;
      const { id } = await startEdit({ ...asked, photo: picture.id, mask: await maskOnServer(), references: references.ids });
      // All that is repainted lies on the result's side of the line, to begin with.
      const line = (100 * boundsOf(mask).left) / mask.width;
      results.add({ id, photo: picture, seeds: asked.seeds, told: settings.told(asked), line });
    } finally {
      button.disabled = false;
    }
  });
}

/** The mask's id; it is sent when it has changed since. */
async function maskOnServer() {
  const { mask, picture, sent } = page;
  if (sent?.mask === mask && sent.version === mask.version) return sent.id;
  const version = mask.version;
  const { id } = await sendMask(await maskToPng(mask), picture.id);
  page.sent = { mask, version, id };
  return id;
}

function whatIsMissing() {
  if (!page.picture) return "Open a photo first.";
  if (!page.anyMask) return "Brush over what is to be repainted.";
  if (!references.photos.length) return "Add a reference: a photo of what to paint.";
  const { name, several_references: several } = settings.chosen;
  if (references.photos.length > 1 && !several) return `${name} takes one reference: remove the others.`;
  return "";
}

/** A change of the mask from outside the tools. @param {() => ?object} change */
function changeMask(change) {
  if (!page.mask) return;
  stage.stop();
  stage.maskChanged(change() ?? null);
  showMask();
}

function showMask() {
  const { picture, mask } = page;
  const pixels = mask ? mask.count() : 0;
  page.anyMask = pixels > 0;
  const share = mask && (100 * pixels) / mask.data.length;
  const painted = pixels ? `${share < 1 ? "less than 1" : Math.round(share)} % to be repainted` : "nothing to be repainted yet";
  const size = picture && `${picture.width} × ${picture.height} px`;
  find("#photo-told").textContent = picture ? `${picture.name} · ${size} · ${painted}` : "No photo yet.";
  find("#undo").disabled = !mask?.canUndo;
  find("#redo").disabled = !mask?.canRedo;
  for (const name of ["invert", "clear", "mask-open"]) find(`#${name}`).disabled = !mask;
  find("#photo-open").hidden = !picture;
  if (references) showHint();
}

function showHint() {
  const running = results.running, missing = whatIsMissing();
  // What was missing when one pressed Paint stands above in red, until it is there.
  if (page.missed && page.missed !== missing) find("#settings-error").textContent = page.missed = "";
  find("#paint-hint").textContent = page.missed ? "" : missing || (running ? `Edit ${running.number} is on its way; Esc cancels it.` : "");
}

/** The slider's places are even steps of the logarithm: from a px to half the photo. */
function resizeBrush(place) {
  const slider = find("#brush-size");
  if (place !== undefined) slider.value = place;
  const most = page.picture ? Math.max(8, Math.min(page.picture.width, page.picture.height) / 2) : 64;
  tools.size = Math.round(most ** (slider.value / SIZES));
  find("#brush-size-told").textContent = `${tools.size} px`;
  slider.setAttribute("aria-valuetext", `${tools.size} px`);
  stage.toolChanged();
}

function choose(name) {
  stage.stop();
  tools.name = name;
  find(`input[name="tool"][value="${name}"]`).checked = true;
  stage.toolChanged();
}

function announce(text) { find("#told").textContent = text; }

/** Do something, and say under a part of the page why it cannot be done. */
async function attempt(place, action) {
  find(place).textContent = "";
  try {
    await action();
  } catch (error) {
    find(place).textContent = error.message;
  }
}

/** Files that were dropped or pasted. @param {File[]} files @param {boolean} asReferences */
async function takeFiles(files, asReferences) {
  if (!page.offered || !files.length) return;
  if (asReferences) {
    await references.add(files);
    announce("A reference is added.");
  } else await openPhoto(files[0], files[0].name || "pasted.png");
}

function listen() {
  const on = (selector, action, kind = "click") => find(selector).addEventListener(kind, action);
  const picker = (buttons, input, take) => {
    for (const button of buttons) on(button, () => find(input).click());
    on(input, async () => {
      const files = [...find(input).files];
      find(input).value = ""; // So that the same file can be chosen again.
      if (files.length && page.offered) await take(files);
    }, "change");
  };
  picker(["#photo-choose", "#photo-open"], "#photo-file", ([file]) => openPhoto(file, file.name));
  picker(["#mask-open"], "#mask-file", ([file]) => openMask(file));
  picker(["#reference-open"], "#reference-file", (files) => references.add(files));
  on("#example", openExample);
  on("#cut-open", () => cutter?.open(page.picture));
  on("#settings", (event) => { event.preventDefault(); paint(); }, "submit");
  find("#settings").noValidate = true; // What is missing comes first; then the browser says what is wrong.
  on("#model", () => showHint(), "change");
  on("#brush-size", () => resizeBrush(), "input");
  on("#toolbar", (event) => { if (event.target.name === "tool") choose(event.target.value); }, "change");
  on("#help-open", () => find("#help").showModal());
  on("#help-close", () => find("#help").close());
  const actions = {
    undo: () => changeMask(() => page.mask.undo()), redo: () => changeMask(() => page.mask.redo()),
    invert: () => changeMask(() => page.mask.invert()), clear: () => changeMask(() => page.mask.clear()),
    "zoom-in": () => stage.zoom(2), "zoom-out": () => stage.zoom(-2), "zoom-fit": () => stage.fit(),
  };
  for (const [name, action] of Object.entries(actions)) on(`#${name}`, action);
  listenToKeys({
    ...actions, choose, paint, help: () => find("#help").showModal(),
    smaller: () => resizeBrush(Number(find("#brush-size").value) - 4),
    larger: () => resizeBrush(Number(find("#brush-size").value) + 4),
    stop: () => { if (!stage.stop()) results.running?.forget(); },
  });
  listenToFiles();
  listenToLeaving();
}

/** Leaving is asked about while there are strokes that no edit has. */
function listenToLeaving() {
  addEventListener("beforeunload", (event) => {
    const { mask, sent } = page;
    if (page.anyMask && !(sent?.mask === mask && sent.version === mask.version)) event.preventDefault();
  });
}

function listenToFiles() {
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    takeFiles(files, Boolean(page.picture) || find("#references").contains(document.activeElement));
  });
  const target = (event) => (find("#references").contains(event.target) ? find("#references") : find("#stage"));
  const mark = (element) => {
    for (const one of [find("#references"), find("#stage")]) one.classList.toggle("over", one === element);
  };
  document.addEventListener("dragover", (event) => { event.preventDefault(); mark(target(event)); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(null); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(null);
    const files = [...event.dataTransfer.files], asReferences = target(event) === find("#references");
    const none = "What was dropped is no file: save the picture first, then drop its file, or copy and paste it.";
    find(asReferences ? "#reference-error" : "#photo-error").textContent = files.length ? "" : none;
    takeFiles(files, asReferences);
  });
}
