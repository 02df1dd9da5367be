
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

// Where a label may stand beside its mark, in pixels from its middle.
const PLACES = [[8, 0, "start"], [-8, 0, "end"], [0, -12, "middle"], [0, 12, "middle"],
  [6, -12, "end"], [-6, -12, "start"], [6, 12, "end"], [-6, 12, "start"]];
const MOST_TRIED = 60;

function boxes(mark, label) {
  const x = mark.x + mark.width / 2, y = mark.y + mark.height / 2 - label.height / 2;
  const before = {start: 0, middle: label.width / 2, end: label.width};
  return PLACES.map(([dx, dy, anchor]) =>
    ({left: x + dx - before[anchor], top: y + dy, width: label.width, height: label.height}));
}

function overlap(a, b) {
  return a.left < b.left + b.width && b.left < a.left + a.width
    && a.top < b.top + b.height && b.top < a.top + a.height;
}

function within(box, frame) {
  return box.left >= frame.left && box.left + box.width <= frame.left + frame.width
    && box.top >= frame.top && box.top + box.height <= frame.top + frame.height;
}

function write(point) {
  const label = document.createElementNS(point.namespaceURI, "text");
  const mark = point.lastElementChild;
  label.textContent = point.dataset.label;
  label.classList.add("label");
  label.setAttribute("x", mark.getAttribute("cx") ?? mark.getAttribute("x"));
  label.setAttribute("y", mark.getAttribute("cy") ?? mark.getAttribute("y"));
  point.closest("svg").append(label);
  return label;
}

function move(label, place) {
  const [dx, dy, anchor] = PLACES[place];
  label.setAttribute("dx", dx);
  label.setAttribute("dy", dy);
  label.setAttribute("text-anchor", anchor);
}

// As many points as there is room for get their labels, the highest first.
function labelPoints(plot) {
  for (const old of plot.querySelectorAll(".label")) old.remove();
  for (const old of plot.querySelectorAll(".labelled")) old.classList.remove("labelled");
  const frame = plot.getBoundingClientRect();
  const box = element => element.getBoundingClientRect();
  const taken = [...plot.querySelectorAll("text, .point > :last-child")].map(box);
  const marks = [...plot.querySelectorAll("[data-label]")]
    .map(point => [point, box(point.lastElementChild)])
    .sort(([, a], [, b]) => a.top - b.top).slice(0, MOST_TRIED);
  const labels = marks.map(([point]) => write(point));
  labels.map(box).forEach((size, i) => {
    const candidates = boxes(marks[i][1], size);
    const place = candidates.findIndex(
      one => within(one, frame) && !taken.some(other => overlap(one, other)));
    if (place < 0) return labels[i].remove();
    taken.push(candidates[place]);
    move(labels[i], place);
    marks[i][0].classList.add("labelled");
  });
}

// A point that is pointed at shows its label, on a phone until the next touch.
function pointAt(element) {
  for (const old of document.querySelectorAll(".pointed")) old.remove();
  const found = element.closest("[data-label]:not(.labelled)");
  if (!found) return;
  const label = write(found), plot = found.closest("svg");
  const candidates = boxes(found.lastElementChild.getBoundingClientRect(),
    label.getBoundingClientRect());
  const inside = candidates.findIndex(one => within(one, plot.getBoundingClientRect()));
  move(label, Math.max(inside, 0));
  label.classList.add("pointed");
}

const resized = new ResizeObserver(plots => plots.forEach(({target}) => labelPoints(target)));
for (const plot of document.querySelectorAll(".plot")) resized.observe(plot);
document.addEventListener("pointerover", event => pointAt(event.target));

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
