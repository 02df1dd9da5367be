
"use strict";
const search = document.querySelector("input[type=search]");
const table = search && search.closest("section").querySelector("table");

function matches(row, words) {
  const text = row.textContent.toLowerCase();
  return words.every(
    word => word[0] === "^" ? text.startsWith(word.slice(1)) : text.includes(word));
}

function filter(query) {
  search.value = query;
  const words = query.toLowerCase().split(/\s+/);
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) row.hidden = !matches(row, words);
  const shown = rows.filter(row => !row.hidden).length;
  const what = search.closest("section").querySelector("h2").textContent;
  document.querySelector("output").textContent = `${shown} of ${rows.length} ${what}`;
}

// A cell without a number sorts last in a column of numbers, whichever way.
function compare(a, b, sign) {
  const numbers = [a, b].map(cell => cell.dataset.value);
  if (numbers.every(n => n !== undefined)) return sign * (numbers[0] - numbers[1]);
  if (numbers.some(n => n !== undefined)) return numbers[0] === undefined ? 1 : -1;
  return sign * a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
}

function sort(head) {
  const order = head.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of head.parentNode.children) other.ariaSort = "none";
  head.ariaSort = order;
  const body = head.closest("table").tBodies[0];
  const column = head.cellIndex, sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows];
  rows.sort((a, b) => compare(a.cells[column], b.cells[column], sign));
  body.append(...rows);
}

document.addEventListener("click", event => {
  const source = event.target.closest("[data-query]");
  const head = event.target.closest("th[aria-sort]");
  if (source && search) {
    filter(source.dataset.query);
    search.closest("section").scrollIntoView();
    search.focus({preventScroll: true});
  } else if (head) sort(head);
});

if (search) {
  search.addEventListener("input", () => filter(search.value));
  document.querySelector(".clear").addEventListener("click", () => filter(""));
  filter("");
}
