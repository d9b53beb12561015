// Tables of class "sortable": each column's header becomes a button that sorts the rows by that column.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    button.addEventListener("click", () => {
      const sign = header.getAttribute("aria-sort") === "descending" ? 1 : -1;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const compare = (a, b) => {
        const [left, right] = [value(a), value(b)];
        // What is not defined stays last.
        if (left === "" || right === "") return (left === "") - (right === "");
        return sign * (isNaN(left) || isNaN(right) ? left.localeCompare(right) : left - right || 0);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}
