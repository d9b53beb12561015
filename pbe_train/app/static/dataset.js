/** Look into a dataset: filters, the grid, one sample, lists. */

import { address, getJson, sendMark } from "./dataset_api.js";
import { Grid } from "./dataset_grid.js";
import { Lists } from "./dataset_lists.js";
import { counted, make, numberOf, percent } from "./dataset_parts.js";
import { photoOf, SampleDialog } from "./dataset_sample.js";

/** ms after which one asks again while columns are being read; after the last letter typed. */
const READING = 500;
const TYPING = 250;
const TABS = ["samples", "rejects", "failures", "marked"];

const $ = (id) => document.getElementById(id);
const page = { dataset: null, query: {}, tab: "samples", total: 0, names: new Map(), classes: [], marked: { file: "", objects: [], photos: [] } };

const grid = new Grid($("grid"), $("layer"), $("spacer"), {
  rows: async (first, count) => {
    const query = page.query;
    const found = await getJson(address(page.dataset.number, "rows", { ...query, first, count }));
    return query === page.query ? found.rows : [];
  },
  picture: (row) => address(page.dataset.number, `samples/${row.place}/tile`, { build: page.dataset.build }),
  isMarked: (row) => isMarked("object", row.object_id) || isMarked("photo", photoOf(row.object_id)),
  open: (index) => openSample(index),
});
const dialog = new SampleDialog($("sample"), { mark, isMarked, move: (steps) => moveSample(steps) });
const lists = new Lists($("listed"), $("photo"), {
  query: () => page.query,
  name: (label) => page.names.get(label) ?? label,
  tell: (text) => ($("told").textContent = text),
  search: (id) => { clearFilters(); $("text").value = id; choose("samples"); filter(); },
  mark,
  marked: () => page.marked,
  fail,
});

async function start() {
  listen();
  try {
    const { datasets } = await getJson("/api/datasets");
    page.marked = await getJson("/api/left-out");
    if (!datasets.length) throw new Error("No dataset is given: start `pbe app --dataset FOLDER_OR_URL`.");
    $("dataset").replaceChildren(...datasets.map(({ number, name }) => make("option", { value: number, title: name }, shortened(name))));
    $("choose").hidden = datasets.length < 2;
    await openDataset(datasets[0].number);
  } catch (problem) {
    fail(problem);
  }
}

/** A folder's last parts: what tells datasets apart, and fits. @param {string} name */
function shortened(name) {
  const parts = name.split("/");
  return parts.length > 4 ? `…/${parts.slice(-3).join("/")}` : name;
}

async function openDataset(number) {
  fail(null);
  page.dataset = null;
  $("told").textContent = "opening the dataset";
  $("app").inert = false;
  grid.show(0, true);
  try {
    const info = await getJson(address(number, ""));
    page.dataset = { number, info, build: info.fingerprint.slice(0, 12) };
    document.title = `${info.name} · Look into a dataset`;
    const splits = Object.entries(info.splits).map(([name, count]) => make("option", { value: name }, `${name} (${counted(count)})`));
    $("split").replaceChildren(make("option", { value: "" }, "any"), ...splits);
    const sum = (counts) => Object.values(counts).reduce((all, count) => all + count, 0);
    $("tab-rejects").textContent = `Rejects ${counted(sum(info.books.rejects))}`;
    $("tab-failures").textContent = `Failures ${counted(sum(info.books.failures))}`;
    showMarkCount();
    await filter();
  } catch (problem) {
    $("told").textContent = "";
    fail(problem);
  }
}

/** Show what passes the filters as they are now. */
async function filter() {
  if (!page.dataset) return;
  const share = (id) => ($(id).value === "" || !$(id).validity.valid ? "" : String($(id).valueAsNumber / 100));
  page.query = {
    label: page.label ?? "", split: $("split").value, kinds: $("kinds").value, text: $("text").value.trim(),
    smallest: share("smallest"), largest: share("largest"),
  };
  const [smallest, largest] = ["smallest", "largest"].map($);
  const wrong = !smallest.validity.valid || !largest.validity.valid || smallest.valueAsNumber > largest.valueAsNumber;
  fail(wrong ? new Error("Object, % of the photo: give numbers from 0 to 100, the smaller one first.") : null);
  showClasses();
  await Promise.all([page.tab === "samples" ? readRows(true) : lists.filter(), readClasses()]);
}

/** Ask for the number of samples; again while columns are being read. @param {boolean} anew */
async function readRows(anew) {
  const { query, dataset } = page;
  clearTimeout(page.rowsLater);
  try {
    const found = await getJson(address(dataset.number, "rows", { ...query, count: 0 }));
    if (query !== page.query || dataset !== page.dataset) return;
    page.total = found.total;
    if (page.tab === "samples") {
      const of = found.total === dataset.info.samples ? "" : ` of ${counted(dataset.info.samples)}`;
      const reading = found.read < 1 ? `; ${percent(Math.floor(100 * found.read) / 100)} read so far` : "";
      $("told").textContent = `${counted(found.total)}${of} ${dataset.info.samples === 1 ? "sample" : "samples"}${reading}`;
    }
    $("nothing").hidden = found.total > 0 || found.read < 1;
    $("grid").classList.toggle("none", !found.total);
    grid.show(found.total, anew);
    if (found.read < 1) page.rowsLater = setTimeout(() => readRows(false), READING);
  } catch (problem) {
    if (query === page.query) fail(problem);
  }
}

/** Ask for the classes among what passes the other filters; again while they are being read. */
async function readClasses() {
  const { query, dataset } = page;
  clearTimeout(page.classesLater);
  try {
    const found = await getJson(address(dataset.number, "classes", { ...query, label: "" }));
    if (query !== page.query || dataset !== page.dataset) return;
    page.classes = found.classes;
    page.allClasses = found.all;
    page.classesRead = found.read;
    for (const { label, name } of found.classes) page.names.set(label, name);
    showClasses();
    if (found.read < 1) page.classesLater = setTimeout(readClasses, READING);
  } catch (problem) {
    if (query === page.query) $("classes-told").textContent = problem.message;
  }
}

function showClasses() {
  const text = $("class-text").value.trim().toLowerCase();
  const most = Math.max(1, ...page.classes.map(({ count }) => count));
  const shown = page.classes.filter(({ label, name }) => !text || name.toLowerCase().includes(text) || label.toLowerCase() === text);
  if (page.label && !shown.some(({ label }) => label === page.label)) {
    shown.unshift({ label: page.label, name: page.names.get(page.label) ?? page.label, count: 0 });
  }
  const focused = document.activeElement?.dataset?.label;
  $("classes").replaceChildren(...shown.map(({ label, name, count }) => {
    const bar = make("button", { type: "button", title: label, onclick: () => chooseClass(label), "aria-pressed": label === page.label, "data-label": label },
      make("span", {}, name), make("span", {}, counted(count)));
    bar.style.setProperty("--share", `${(100 * count) / most}%`);
    return make("li", {}, bar);
  }));
  if (focused) $("classes").querySelector(`[data-label="${CSS.escape(focused)}"]`)?.focus();
  const reading = page.classesRead < 1 ? `; ${percent(Math.floor(100 * page.classesRead) / 100)} read so far` : "";
  const some = page.allClasses > page.classes.length ? ` (the largest ${counted(page.classes.length)})` : "";
  $("classes-told").textContent = page.dataset ? `${numberOf(page.allClasses ?? 0, "class", "classes")}${some}${reading}` : "";
}

function chooseClass(label) {
  page.label = page.label === label ? "" : label;
  filter();
}

function clearFilters() {
  $("form").reset();
  page.label = "";
  $("class-text").value = "";
}

function choose(tab) {
  page.tab = tab;
  for (const name of TABS) {
    $(`tab-${name}`).setAttribute("aria-selected", name === tab);
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  // What a list is not filtered by cannot be set there.
  for (const id of ["smallest", "largest", "kinds"]) $(id).disabled = tab !== "samples";
  for (const id of ["text", "split"]) $(id).disabled = tab === "marked";
  $("samples").hidden = tab !== "samples";
  $("listed").hidden = tab === "samples";
  $("listed").setAttribute("aria-labelledby", `tab-${tab}`);
  $("told").textContent = "";
  fail(null);
  if (!page.dataset) return;
  if (tab === "samples") readRows(false);
  else lists.show(tab, page.dataset);
}

async function openSample(index) {
  const dataset = page.dataset;
  try {
    const row = await grid.rowAt(index);
    if (!row || dataset !== page.dataset) return;
    page.opened = index;
    await dialog.show(dataset, row, `sample ${counted(index + 1)} of ${counted(page.total)}`);
  } catch (problem) {
    fail(problem);
  }
}

function moveSample(steps) {
  const index = page.opened + steps;
  if (index < 0 || index >= page.total) return;
  grid.go(index, false);
  openSample(index);
}

function isMarked(what, id) {
  return page.marked[`${what}s`].includes(id);
}

async function mark(what, id, leave) {
  page.marked = await sendMark({ what, id, leave });
  showMarkCount();
  grid.refresh();
}

function showMarkCount() {
  $("tab-marked").textContent = `Left out ${counted(page.marked.objects.length + page.marked.photos.length)}`;
}

function fail(problem) {
  $("error").textContent = problem?.message ?? "";
}

function listen() {
  let typing = 0;
  const later = (action) => () => { clearTimeout(typing); typing = setTimeout(action, TYPING); };
  for (const id of ["text", "smallest", "largest"]) $(id).addEventListener("input", later(filter));
  for (const id of ["split", "kinds"]) $(id).addEventListener("change", filter);
  $("class-text").addEventListener("input", later(showClasses));
  $("dataset").addEventListener("change", () => {
    const number = Number($("dataset").value); // A reset form has the first one.
    clearFilters();
    page.classes = [];
    openDataset(number);
  });
  $("form").addEventListener("submit", (event) => { event.preventDefault(); filter(); });
  $("form").addEventListener("reset", () => { const chosen = $("dataset").value; setTimeout(() => { $("dataset").value = chosen; page.label = ""; filter(); }); });
  for (const [place, name] of TABS.entries()) {
    $(`tab-${name}`).addEventListener("click", () => choose(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = TABS[(place + step + TABS.length) % TABS.length];
      choose(next);
      $(`tab-${next}`).focus();
    });
  }
  $("sample").addEventListener("close", () => grid.go(page.opened, true));
  $("help-open").addEventListener("click", () => $("help").showModal());
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select") || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    $("filters").open = true;
    $("text").focus();
  });
  if (matchMedia("(max-width: 60rem)").matches) $("filters").open = false;
}

start();
