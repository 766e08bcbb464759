// Sorting and folding of tables. The page is complete without it.
(() => {
  "use strict";
  const FOLD = 20;

  // Numbers by size, text by language; what has no value comes last in either direction.
  const compare = (a, b, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
    return sign * order;
  };

  const sort = (table, column, heads) => {
    const head = heads[column];
    const first = head.classList.contains("text") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
    const body = table.tBodies[0];
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[column].dataset.v, b.cells[column].dataset.v, sign));
    body.append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, column, heads));
      head.append(button);
    });
    const total = table.tBodies[0].rows.length;
    if (total <= FOLD + 5) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "unfold";
    const fold = (folded) => {
      table.classList.toggle("folded", folded);
      button.textContent = folded ? `Show all ${total} rows` : `Show the first ${FOLD} rows`;
      button.setAttribute("aria-expanded", String(!folded));
    };
    button.addEventListener("click", () => fold(!table.classList.contains("folded")));
    table.parentElement.after(button);
    fold(true);
  }
})();
