/** What is not in the grid: boxes that were rejected, samples that failed, and what is marked to be left out. */

import { address, getJson, getPicture } from "./dataset_api.js";
import { counted, make, numberOf, percent } from "./dataset_parts.js";
import { lines } from "./dataset_sample.js";

const PAGE = 100;
const EDGES = ["x_min", "y_min", "x_max", "y_max"];

export class Lists {
  /**
   * @param {HTMLElement} panel @param {HTMLDialogElement} dialog for a photo
   * @param {{query: () => object, name: (label: string) => string, tell: (text: string) => void, search: (text: string) => void,
   *   mark: (what: string, id: string, leave: boolean) => Promise<void>, marked: () => object, fail: (problem: Error) => void}} page
   */
  constructor(panel, dialog, page) {
    Object.assign(this, { panel, dialog, page, first: 0, word: "" });
  }

  /** @param {"rejects"|"failures"|"marked"} kind @param {{number: number, info: object}} dataset */
  async show(kind, dataset) {
    if (kind !== this.kind || dataset !== this.dataset) Object.assign(this, { kind, dataset, first: 0, word: "" });
    await this.fill();
  }

  /** Show the first page of what passes the filters now. */
  async filter() {
    this.first = 0;
    await this.fill();
  }

  async fill() {
    this.stop?.abort();
    this.stop = new AbortController();
    const { signal } = this.stop;
    if (this.kind === "marked") return this.fillMarked();
    const { label, split, text } = this.page.query();
    const rejects = this.kind === "rejects";
    const word = { [rejects ? "reason" : "code"]: this.word };
    const query = { split, text, ...(rejects && { label }), ...word, first: this.first, count: PAGE };
    try {
      const found = await getJson(address(this.dataset.number, this.kind, query), signal);
      if (signal.aborted) return;
      this.page.tell(numberOf(found.total, rejects ? "rejected box" : "failed sample", rejects ? "rejected boxes" : "failed samples"));
      const table = !found.rows.length ? make("p", { className: "quiet" }, found.total ? "" : this.nothing()) : rejects ? this.rejects(found.rows) : this.failures(found.rows);
      this.panel.replaceChildren(this.pages(found.total), table);
    } catch (problem) {
      if (problem.name !== "AbortError") this.page.fail(problem);
    }
  }

  nothing() {
    const all = Object.values(this.dataset.info.books[this.kind]).reduce((sum, count) => sum + count, 0);
    return all ? "None passes these filters." : this.kind === "rejects" ? "No box was rejected." : "No sample failed.";
  }

  /** Which words there are, with counts of the whole dataset, and steps through the pages. */
  pages(total) {
    const rejects = this.kind === "rejects";
    const { books, reasons, codes } = this.dataset.info;
    const meanings = rejects ? reasons : codes;
    const options = Object.entries(books[this.kind]).sort((one, other) => other[1] - one[1]).map(([word, count]) =>
      make("option", { value: word, selected: word === this.word, title: meanings[word] ?? "" }, `${word.replaceAll("_", " ")} (${counted(count)})`));
    const name = rejects ? "Reason" : "Code";
    const last = Math.min(total, this.first + PAGE);
    const step = (text, title, by, can) => make("button", { type: "button", title, disabled: !can, onclick: () => { this.first += by; this.fill(); } }, text);
    return make("div", { className: "pages" },
      make("label", {}, `${name} `, make("select", { onchange: (event) => { this.word = event.target.value; this.filter(); } },
        make("option", { value: "" }, "any"), ...options)),
      this.word && make("span", { className: "quiet" }, meanings[this.word] ?? ""),
      total > PAGE && step("←", "The page before", -PAGE, this.first > 0),
      total > PAGE && make("span", { className: "quiet" }, `${counted(this.first + 1)} to ${counted(last)}`),
      total > PAGE && step("→", "The next page", PAGE, last < total));
  }

  rejects(rows) {
    const { reasons } = this.dataset.info;
    return table(["photo", "class", "reason", "box, % of the photo", "area", "where"], rows.map((row) => {
      const [x0, y0, x1, y1] = EDGES.map((edge) => row[edge]);
      const known = [x0, y0, x1, y1].every((edge) => edge !== null);
      const box = known ? [x0, y0, x1, y1].map((edge) => Math.round(1000 * edge) / 10).join(", ") : "unknown";
      return [
        row.photo_id === null ? "unknown" : make("button", { type: "button", className: "plain", title: "the photo with the box", onclick: () => this.showPhoto(row) }, make("code", {}, row.photo_id)),
        row.label === null ? "unknown" : this.page.name(row.label),
        make("span", { title: reasons[row.reason] ?? "" }, row.reason.replaceAll("_", " "), row.detail && make("span", { className: "quiet" }, ` ${row.detail}`)),
        box,
        known ? percent((x1 - x0) * (y1 - y0)) : "",
        `${row.file}, row ${counted(row.row)}`,
      ];
    }));
  }

  /** The photo of a rejected box, in a dialog. */
  async showPhoto(row) {
    const frame = make("div", { className: "laid" }, make("p", { className: "quiet" }, "reading the photo"));
    const said = `${row.reason.replaceAll("_", " ")}: ${this.dataset.info.reasons[row.reason] ?? ""}`;
    const close = make("button", { type: "button", className: "main", onclick: () => this.dialog.close() }, "Close");
    this.dialog.replaceChildren(make("h2", { id: "photo-title" }, `Photo ${row.photo_id}`), make("p", { className: "quiet" }, said), frame, make("p", {}, close));
    this.dialog.showModal();
    close.focus();
    try {
      const { data } = await getPicture(address(this.dataset.number, `rejects/${row.place}/photo`, { build: this.dataset.build }));
      const image = make("img", { src: URL.createObjectURL(data), alt: `photo ${row.photo_id}` });
      image.onload = () => URL.revokeObjectURL(image.src);
      const [x0, y0, x1, y1] = EDGES.map((edge) => row[edge]);
      frame.replaceChildren(image, lines(1, 1, [["of-box", [x0, y0, x1 - x0, y1 - y0]]]));
    } catch (problem) {
      frame.replaceChildren(make("p", { className: "problem" }, problem.message));
    }
  }

  failures(rows) {
    const { codes } = this.dataset.info;
    return table(["key", "code", "what went wrong", "shard"], rows.map((row) => [
      make("code", {}, row.key), make("span", { title: codes[row.code] ?? "" }, row.code.replaceAll("_", " ")), row.detail, row.shard,
    ]));
  }

  fillMarked() {
    const { file, objects, photos } = this.page.marked();
    this.page.tell(numberOf(objects.length + photos.length, "mark"));
    const row = (what, id) => [what, make("code", {}, id),
      make("button", { type: "button", onclick: () => this.page.search(id) }, "Show"),
      make("button", { type: "button", onclick: () => this.page.mark(what, id, false).then(() => this.fill(), this.page.fail) }, "Keep it")];
    const rows = [...objects.map((id) => row("object", id)), ...photos.map((id) => row("photo", id))];
    const how = make("p", { className: "quiet" }, "A build leaves these out with ", make("code", {}, `--selection.leave_out ${file}`),
      ", into another --out. This dataset stays as it is.");
    this.panel.replaceChildren(rows.length ? how : make("p", { className: "quiet" }, "Nothing is marked. Open a sample, and leave out its object or its photo: the list is written to ", make("code", {}, file), "."),
      rows.length ? table(["what", "id", "", ""], rows) : "");
  }
}

function table(heads, rows) {
  return make("div", { className: "wide" }, make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)))))));
}
