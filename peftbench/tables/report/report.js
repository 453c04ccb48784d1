// The page of `peftbench report`: draws the JSON in #data as a table, two charts and details of the selected runs.
// Values from the runs reach the page only as text nodes and attributes, never as HTML.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = DATA.columns;
const COLUMN = new Map(COLUMNS.map((column, index) => [column.key, Object.assign(column, { index })]));
const NUMBERS = COLUMNS.filter(column => column.form !== "words");
const RUNS = DATA.runs;
const LETTERS = "ABCDEFGHIJKL";
const SVG = document.querySelector("svg").namespaceURI;
const DASHES = ["", "7 3", "2 3"];
const LOOKS = 20; // lines of a legend; all further ones are drawn as "others"
const state = {
  group: DATA.groups.length > 1 ? 0 : -1, // -1: all
  sort: null, // the order of the data: best first, group by group
  descending: false,
  selected: [], // runs; the index of a run selects its letter
  shown: [], // the runs that pass the filter
  averaged: false,
  rows: [], // rows of the table and the scatter: those runs, or their averages
};

const $ = id => document.getElementById(id);
const value = (run, column) => run.cells[column.index];
const letter = row => row.runs.map(run => LETTERS[state.selected.indexOf(run)]).filter(Boolean).sort().join("") || undefined;
const rows = () => (state.averaged ? POINTS : RUNS);
const chosen = () => state.selected.filter(Boolean);

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, content] of Object.entries(attributes)) {
    if (key in node) node[key] = content;
    else node.setAttribute(key, content);
  }
  node.append(...children);
  return node;
}

function draw(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, content] of Object.entries(attributes)) node.setAttribute(key, content);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Averages: one row for the runs that differ only in their seed

const POINTS = [...RUNS.reduce((found, run) => found.set(run.point, [...(found.get(run.point) ?? []), run]), new Map()).values()]
  .map(runs => ({ all: runs, runs: [], group: runs[0].group, data: `${runs[0].group} ${runs[0].data}`, full: runs[0].full }));
const COUNT = { key: "n", header: "n", name: "runs averaged", form: "count", better: null, shown: false, same: null, index: COLUMNS.length };
for (const run of RUNS) {
  run.runs = [run];
  run.spreads = [];
  run.cells.push(isScored(run) ? 1 : 0);
}
COLUMN.set("n", COUNT);
COLUMNS.splice(COLUMNS.indexOf(COLUMN.get("score")) + 1, 0, COUNT);

// Fill a row with the means over these of its runs, and their standard deviations (n - 1). As in peftbench results
// --mean, only runs with a score count, and the difference from full fine-tuning is that of the means.
function average(row, found) {
  const runs = once(found), scored = runs.filter(isScored), counted = runs.length > 1 ? scored : runs;
  row.runs = found;
  row.cells = [];
  row.spreads = [];
  for (const column of COLUMNS) {
    if (column.form === "words") {
      row.cells[column.index] = together(runs.map(run => value(run, column)), column.key === "status") || null;
      continue;
    }
    const numbers = counted.map(run => value(run, column)).filter(number => number !== null);
    const centre = mean(numbers);
    row.cells[column.index] = centre;
    if (numbers.length > 1) {
      row.spreads[column.index] = Math.sqrt(numbers.reduce((sum, number) => sum + (number - centre) ** 2, 0) / (numbers.length - 1));
    }
  }
  row.cells[COUNT.index] = scored.length;
  const seed = COLUMN.get("seed"), seeds = runs.map(run => value(run, seed));
  row.cells[seed.index] = Math.min(...seeds);
  row.seeds = seeds.length < 6 ? seeds.sort((a, b) => a - b).join(", ") : `${seeds.length} seeds`;
}

// If a run was trained several times, in several folders: the one with a score that began last.
function once(runs) {
  const turn = run => `${Number(isScored(run))} ${value(run, COLUMN.get("created"))}`;
  const last = new Map();
  for (const run of runs) if (!last.has(run.run) || turn(run) > turn(last.get(run.run))) last.set(run.run, run);
  return [...last.values()];
}

function isBelow(row) { // below a baseline, which costs nothing
  const score = value(row, COLUMN.get("score"));
  return score !== null && DATA.baselines.some(name => COLUMN.has(name) && value(row, COLUMN.get(name)) > score);
}

function isScored(run) { return value(run, COLUMN.get("score")) !== null; }

function differences() { // from the best full fine-tuning of the group on the same data
  const [delta, score] = [COLUMN.get("delta"), COLUMN.get("score")], best = new Map();
  if (!delta) return;
  for (const row of POINTS.filter(row => row.full && row.runs.length && value(row, score) !== null)) {
    best.set(row.data, Math.max(best.get(row.data) ?? -Infinity, value(row, score)));
  }
  for (const row of POINTS.filter(row => row.runs.length)) {
    const own = value(row, score);
    row.cells[delta.index] = own === null || !best.has(row.data) ? null : own - best.get(row.data);
    row.spreads[delta.index] = undefined;
  }
}

function mean(numbers) {
  if (!numbers.length) return null;
  if (numbers.every(number => number === numbers[0])) return numbers[0]; // to the last digit
  return numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
}

function together(words, counted) { // the distinct words, with the number of times that each occurs
  const found = new Map();
  for (const word of words) if (word !== null) found.set(word, (found.get(word) ?? 0) + 1);
  return [...found].map(([word, times]) => (counted && found.size > 1 ? `${times} ${word}` : word)).join(", ");
}

// A row's text in a column; an average has its seeds, and ± after its scores.
function shownAs(row, column) {
  if (column.key === "seed" && row.seeds !== undefined) return row.seeds;
  const spread = column.better === "higher" && column.form === "score" ? row.spreads[column.index] : undefined;
  const mark = column.key === "score" && isBelow(row) ? " ▽" : "";
  return format(column, value(row, column)) + (spread === undefined ? "" : ` ± ${spread.toFixed(2)}`) + mark;
}

// Numbers as text

function format(column, number) {
  if (number === null) return "";
  switch (column.form) {
    case "words": return number;
    case "count": return Math.round(number).toLocaleString("en");
    case "score": return number !== 0 && Math.abs(number) < 0.1 ? String(Number(number.toPrecision(2))) : number.toFixed(2);
    case "signed": return (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);
    case "change": return (number < 0 ? "−" : "+") + Math.abs(number).toFixed(3);
    case "duration": return duration(number);
    default: return String(Number(number.toPrecision(6)));
  }
}

function duration(seconds) {
  const whole = Math.round(seconds), two = number => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

function short(number) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["K", 1e3]]) {
    if (Math.abs(number) >= size) return Number((number / size).toPrecision(4)) + unit;
  }
  const rounded = Number(number.toPrecision(4));
  return rounded !== 0 && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
}

// Filters

for (const run of RUNS) {
  const words = COLUMNS.filter(column => column.form === "words").map(column => value(run, column));
  run.words = [...words, run.folder, run.error, ...run.overrides].join("\n").toLowerCase();
  run.texts = new Map();
}

function texts(run, column) { // the names of a value: for a mixture, that of each part and that of the whole
  if (!run.texts.has(column)) {
    const text = String(value(run, column) ?? "");
    run.texts.set(column, [...new Set([text, ...text.split(" + "), format(column, value(run, column))])]);
  }
  return run.texts.get(column);
}

function pattern(text, open) {
  const escaped = text.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replaceAll("*", ".*");
  return new RegExp(`^${escaped}${open ? "" : "$"}`, "is");
}

// The meaning of a filter's key: a column, or a setting in which the runs differ; null for neither.
function meaning(key) {
  const column = COLUMN.get(key), at = DATA.settings.keys.indexOf(key);
  if (column) return { texts: run => texts(run, column), number: column.form === "words" ? null : run => value(run, column) };
  return at < 0 ? null : { texts: run => [setting(run, at)], number: null };
}

function condition(word, faults) {
  const match = /^([\w.]+)(!=|>=|<=|=|>|<)(.*)$/s.exec(word);
  if (match === null) return run => run.words.includes(word.toLowerCase());
  const [, key, sign, wanted] = match, meant = meaning(key);
  if (meant === null) {
    const begins = length => COLUMNS.map(column => column.key).filter(one => one.startsWith(key.slice(0, length)));
    const near = [key.length, 4, 2].map(begins).find(found => found.length) ?? [];
    faults.push(`${key} is not a column${near.length ? `; did you mean ${near.join(" or ")}?` : "."}`);
    return () => true;
  }
  if (wanted === "") return () => true; // still being typed
  if (/[<>]/.test(sign)) {
    const limit = Number(wanted);
    if (meant.number === null || Number.isNaN(limit)) {
      faults.push(`${word}: ${sign} needs a column of numbers and a number.`);
      return () => true;
    }
    const holds = { ">": a => a > limit, "<": a => a < limit, ">=": a => a >= limit, "<=": a => a <= limit }[sign];
    return run => meant.number(run) !== null && holds(meant.number(run));
  }
  const patterns = wanted.split(",").filter(Boolean).map(text => {
    // a value that no run has is taken for the beginning of one that is being typed
    const whole = pattern(text, false);
    return RUNS.some(run => meant.texts(run).some(one => whole.test(one))) ? whole : pattern(text, true);
  });
  return run => meant.texts(run).some(text => patterns.some(one => one.test(text))) === (sign === "=");
}

function filter() {
  const faults = [], words = ($("filter").value.match(/(?:[^\s"]|"[^"]*"?)+/g) ?? []).map(word => word.replaceAll('"', ""));
  const conditions = words.filter(Boolean).map(word => condition(word, faults));
  state.shown = RUNS.filter(run => (state.group < 0 || run.group === state.group) && conditions.every(one => one(run)));
  $("count").replaceChildren(
    `${state.shown.length.toLocaleString("en")} of ${RUNS.length.toLocaleString("en")} runs`,
    state.averaged ? ` in ${new Set(state.shown.map(run => run.point)).size.toLocaleString("en")} averages` : "",
    make("span", { className: "whole-name" }, state.group < 0 ? "" : `: ${DATA.groups[state.group]}`),
    ...faults.map(fault => make("span", { className: "fault" }, ` · ${fault}`)),
  );
  const shown = new Set(state.shown);
  if (state.averaged) averageShown(shown);
  state.rows = rows().filter(row => row.runs.some(run => shown.has(run)));
  $("marks").hidden = !state.rows.some(isBelow);
  const visible = new Set(state.rows);
  for (const row of rows()) if (row.line.hidden === visible.has(row)) row.line.hidden = !visible.has(row);
  markBest();
  drawScatter();
  if (chosen().length === 1) drawDifferences(); // relative to the other runs shown
}

function averageShown(shown) { // only over the runs that pass; rows that have changed are written again
  const stale = POINTS.filter(row => {
    const runs = row.all.filter(run => shown.has(run));
    const same = runs.length === row.runs.length && runs.every((run, index) => run === row.runs[index]);
    if (!same && runs.length) average(row, runs);
    else if (!same) row.runs = [];
    return !same;
  });
  if (!stale.length) return;
  differences();
  for (const row of POINTS) for (const [column, cell] of row.tds) {
    const text = row.runs.length ? shownAs(row, column) : "";
    if (cell.textContent !== text) cell.textContent = text;
  }
  order();
  showSelection();
}

// The table

function buildTable() {
  const columns = COLUMNS.filter(column => column.shown);
  const head = make("tr");
  for (const column of columns) {
    const button = make("button", { type: "button" }, column.header);
    button.addEventListener("click", () => sortBy(column));
    head.append(make("th", { scope: "col", className: column.form === "words" ? "" : "number" }, button));
    head.lastChild.dataset.key = column.key;
  }
  const body = make("tbody");
  for (const row of rows()) {
    row.check = make("input", { type: "checkbox" });
    row.mark = make("span", { className: "badge", hidden: true });
    row.line = make("tr");
    row.tds = new Map();
    for (const column of columns) {
      const text = shownAs(row, column);
      if (column.key === "method") {
        row.line.append(make("th", { scope: "row" }, make("label", {}, row.check, row.mark, make("span", {}, ...breakable(text)))));
        continue;
      }
      const long = column.form === "words" && text.length > 24;
      const cell = make("td", { className: column.form !== "words" ? "number" : long ? "text" : "" }, text);
      row.tds.set(column, cell);
      row.line.append(cell);
    }
    row.line.of = row;
  }
  $("table").replaceChildren(make("thead", {}, head), body);
  body.addEventListener("click", event => {
    const line = event.target.closest("tr");
    const label = event.target.closest("label"); // a click on it arrives a second time, from its checkbox
    if (!line || (label && event.target !== line.of.check)) return;
    if (!String(getSelection())) toggle(line.of);
  });
  order();
  showSelection();
}

function sortBy(column) {
  const first = column.better === "higher"; // the best first, then in reverse order
  state.descending = state.sort === column ? !state.descending : first;
  state.sort = column;
  order();
}

function order() {
  const { sort, descending } = state, collator = new Intl.Collator("en", { numeric: true });
  const unsorted = state.averaged ? POINTS.slice().sort(byScore) : RUNS;
  const sorted = sort === null ? unsorted : unsorted.slice().sort((one, other) => {
    const [a, b] = [value(one, sort), value(other, sort)];
    if (a === null || b === null) return (a === null) - (b === null); // rows without a value come last
    return (sort.form === "words" ? collator.compare(a, b) : a - b) * (descending ? -1 : 1);
  });
  $("table").tBodies[0].append(...sorted.map(row => row.line));
  for (const head of $("table").tHead.rows[0].cells) {
    const here = head.dataset.key === sort?.key;
    if (here) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
    head.firstChild.textContent = COLUMN.get(head.dataset.key).header + (here ? (descending ? " ↓" : " ↑") : "");
  }
}

function byScore(one, other) { // in the order of the data: group by group, the best first
  const [a, b] = [one, other].map(row => value(row, COLUMN.get("score")) ?? -Infinity);
  return one.group - other.group || (a === b ? 0 : b - a);
}

function markBest() { // among the rows shown, and only if the runs may be compared
  const scored = state.rows.filter(row => value(row, COLUMN.get("score")) !== null), groups = new Set(scored.map(row => row.group));
  for (const column of COLUMNS.filter(column => column.shown && column.better !== null)) {
    const numbers = scored.map(row => value(row, column)).filter(number => number !== null);
    const sign = column.better === "higher" ? 1 : -1;
    const goal = sign * numbers.reduce((best, number) => Math.max(best, sign * number), -Infinity);
    const plain = groups.size > 1 || numbers.every(number => number === goal);
    for (const row of rows()) row.tds.get(column)?.classList.toggle("best", !plain && row.runs.length > 0 && value(row, column) === goal && value(row, COLUMN.get("score")) !== null);
  }
}

// Charts

function ticks(low, high, log, most) {
  if (log) {
    const decades = Math.floor(Math.log10(high)) - Math.ceil(Math.log10(low));
    const found = [], step = Math.max(1, Math.ceil((decades + 1) / most));
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const times of [1, 2, 5]) {
        const tick = Number(`${times}e${power}`), wanted = times === 1 ? power % step === 0 : 3 * (decades + 1) <= most;
        if (wanted && tick >= low && tick <= high) found.push(tick);
      }
    }
    if (found.length > 1) return found;
  }
  const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(times => times * unit >= rough) * unit;
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

function scale(numbers, log, start, end) {
  const wrap = log ? Math.log10 : number => number, unwrap = log ? number => 10 ** number : number => number;
  let low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
  [low, high] = [wrap(low), wrap(high)];
  const room = (high - low) * 0.06 || Math.abs(low) * 0.05 || 0.5;
  [low, high] = [low - room, high + room];
  const place = number => start + ((wrap(number) - low) / (high - low)) * (end - start);
  return { place, ticks: most => ticks(unwrap(low), unwrap(high), log, most) };
}

// The frame of a chart; null if there is nothing to draw.
function frame(holder, across, up, points) {
  const node = holder.querySelector("svg"), width = holder.clientWidth || 600;
  const height = Math.round(Math.min(440, Math.max(260, width * 0.62)));
  node.setAttribute("viewBox", `0 0 ${width} ${height}`);
  node.setAttribute("height", height);
  node.replaceChildren();
  if (!points.length) {
    node.setAttribute("height", 0);
    return null;
  }
  const left = 52, right = width - 18, top = 26, bottom = height - 40;
  const x = scale(points.map(point => point.x), across.log, left, right);
  const y = scale(points.map(point => point.y), up.log, bottom, top);
  for (const tick of y.ticks(6)) {
    node.append(draw("line", { class: "grid", x1: left, x2: right, y1: y.place(tick), y2: y.place(tick) }));
    node.append(draw("text", { x: left - 6, y: y.place(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of x.ticks(Math.max(3, Math.floor(width / 75)))) {
    node.append(draw("line", { class: "grid", y1: top, y2: bottom, x1: x.place(tick), x2: x.place(tick) }));
    node.append(draw("text", { y: bottom + 16, x: x.place(tick), "text-anchor": "middle" }, short(tick)));
  }
  node.append(draw("text", { class: "label", x: 2, y: 13 }, up.name + (up.log ? " (log)" : "")));
  node.append(draw("text", { class: "label", x: right, y: height - 4, "text-anchor": "end" }, across.name + (across.log ? " (log)" : "")));
  return { node, x: x.place, y: y.place, left, right, top, bottom };
}

const SHAPES = [
  r => `M${r} 0A${r} ${r} 0 1 1 ${-r} 0A${r} ${r} 0 1 1 ${r} 0Z`,
  r => `M${-r * 0.88} ${-r * 0.88}h${r * 1.76}v${r * 1.76}h${-r * 1.76}Z`,
  r => `M0 ${-r * 1.3}L${r * 1.1} 0L0 ${r * 1.3}L${-r * 1.1} 0Z`,
  r => `M0 ${-r * 1.2}L${r * 1.15} ${r * 0.85}H${-r * 1.15}Z`,
  r => `M0 ${r * 1.2}L${r * 1.15} ${-r * 0.85}H${-r * 1.15}Z`,
  r => plus(r),
  r => star(r * 1.35),
  r => `M${r * 1.2} 0L${-r * 0.85} ${r * 1.15}V${-r * 1.15}Z`,
  r => `M${-r * 1.2} 0L${r * 0.85} ${r * 1.15}V${-r * 1.15}Z`,
  r => polygon(6, r * 1.1),
];

function polygon(corners, radius, inner = radius) {
  const places = Array.from({ length: 2 * corners }, (_, index) => {
    const angle = (Math.PI * index) / corners - Math.PI / 2, far = index % 2 ? inner : radius;
    return `${(far * Math.cos(angle)).toFixed(2)} ${(far * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${places.filter((_, index) => inner !== radius || index % 2 === 0).join("L")}Z`;
}

function star(r) { return polygon(5, r, r * 0.45); }

function plus(r) {
  const [a, b] = [r * 1.15, r * 0.42];
  return `M${-b} ${-a}H${b}V${-b}H${a}V${b}H${b}V${a}H${-b}V${b}H${-a}V${-b}H${-b}Z`;
}

function colour(index) { // black, the last one, becomes the text colour: white in the dark scheme
  const found = DATA.colours[index % DATA.colours.length];
  return found === "#000000" ? "currentColor" : found;
}

function look(index) {
  return index < LOOKS ? { fill: colour(index), d: SHAPES[index % SHAPES.length](5) } : { fill: "var(--front)", d: SHAPES[0](4) };
}

let plotted = []; // the points of the scatter: {run, x, y, left, top, node}, from left to right

function drawScatter() {
  const [x, y, by] = ["x", "y", "by"].map(id => COLUMN.get($(id).value));
  const metrics = new Set(state.shown.map(run => value(run, COLUMN.get("metric"))));
  const name = column => (column.key === "score" && metrics.size === 1 ? `score, ${[...metrics][0]}` : column.name);
  const across = { name: name(x), log: $("xlog").checked }, up = { name: name(y), log: $("ylog").checked };
  const drawable = (number, axis) => number !== null && (!axis.log || number > 0);
  const points = state.rows
    .map(row => ({ run: row, x: value(row, x), y: value(row, y), spread: [spread(row, x), spread(row, y)] }))
    .filter(point => drawable(point.x, across) && drawable(point.y, up));
  const names = [...new Set(rows().map(row => shownAs(row, by)))].sort(new Intl.Collator("en", { numeric: true }).compare);
  const notes = [];
  plotted = [];
  $("scatter").querySelector(".tip").hidden = true;
  $("legend").replaceChildren();
  const chart = frame($("scatter"), across, up, [...points, ...points.flatMap(ends).filter(end => drawable(end.x, across) && drawable(end.y, up))]);
  if (chart === null) {
    $("scatter-note").textContent = state.shown.length ? `None of the runs shown has both ${x.name} and ${y.name}.` : "No run passes the filter.";
    return;
  }
  if (points.length < state.rows.length) {
    notes.push(`${state.rows.length - points.length} of the ${state.averaged ? "averages" : "runs"} shown are not drawn: they lack ${x.name} or ${y.name}${across.log || up.log ? ", or are not above 0" : ""}.`);
  }
  const comparable = new Set(points.map(point => point.run.group)).size === 1;
  const extra = [];
  if (!comparable) notes.push("These runs differ in task, backbone or split, so that scores say nothing about which is better; choose one set above.");
  else {
    const full = points.filter(point => point.run.full).map(point => point.y);
    if (y.better === "higher" && y.key !== "tokens_per_s" && full.length) {
      const best = full.reduce((a, b) => Math.max(a, b));
      chart.node.append(draw("line", { class: "full", x1: chart.left, x2: chart.right, y1: chart.y(best), y2: chart.y(best) }));
      extra.push([draw("line", { class: "full", x1: 0, x2: 22, y1: 8, y2: 8 }), "full fine-tuning", 22]);
    }
    const edge = x.better && y.better && x !== y ? front(points.filter(point => y.key !== "score" || !isBelow(point.run)), x, y) : [];
    if (edge.length > 1) {
      const places = edge.map(point => `${chart.x(point.x)},${chart.y(point.y)}`).join(" ");
      chart.node.append(draw("polyline", { class: "edge", points: places }));
      extra.push([draw("line", { class: "edge", x1: 3, x2: 19, y1: 8, y2: 8 }), "Pareto front", 22]);
    }
  }
  plotted = points
    .map(point => Object.assign(point, { left: chart.x(point.x), top: chart.y(point.y) }))
    .sort((a, b) => a.left - b.left || a.top - b.top);
  const bars = draw("g", { class: "bars" });
  chart.node.append(bars);
  for (const point of plotted) {
    for (const [from, to] of pairs(ends(point))) {
      const place = (end, axis, low) => (drawable(end[axis], axis === "x" ? across : up) ? chart[axis](end[axis]) : low);
      bars.append(draw("line", {
        class: "spread", x1: place(from, "x", chart.left), y1: place(from, "y", chart.bottom), x2: place(to, "x"), y2: place(to, "y"),
      }));
    }
  }
  if (bars.childNodes.length) extra.push([draw("path", { class: "spread", d: "M11 1V15" }), "± standard deviation over seeds", 22]);
  for (const point of plotted) {
    const index = names.indexOf(shownAs(point.run, by));
    const name = point.run.run ?? `mean of ${value(point.run, COUNT)} run${value(point.run, COUNT) === 1 ? "" : "s"}`;
    point.about = `${shownAs(point.run, COLUMN.get("method"))} · ${name}\n` +
      [...new Set([y, x, COLUMN.get("bottleneck"), COLUMN.get("seed")])].filter(one => one && value(point.run, one) !== null)
        .map(one => `${one.header} ${shownAs(point.run, one)}`).join("\n");
    point.node = draw("path", {
      ...look(index), class: "point", transform: `translate(${point.left.toFixed(1)} ${point.top.toFixed(1)})`,
      role: "button", tabindex: -1, "aria-label": point.about.replaceAll("\n", ", "),
    });
    chart.node.append(point.node);
  }
  chart.node.classList.toggle("many", plotted.length > 200); // otherwise only their outlines would be visible
  plotted[0].node.setAttribute("tabindex", 0);
  chart.node.append(draw("g", { class: "rings" }));
  showRings();

  const there = names.map((name, index) => [name, index]).filter(([name]) => points.some(point => shownAs(point.run, by) === name));
  for (const [name, index] of there.filter(([, index]) => index < LOOKS)) {
    extra.push([draw("path", { ...look(index), class: "point", transform: "translate(8 8)" }), name || "none", 16]);
  }
  if (there.some(([, index]) => index >= LOOKS)) extra.push([draw("path", { ...look(LOOKS), class: "point", transform: "translate(8 8)" }), "others", 16]);
  $("legend").replaceChildren(...extra.map(([mark, name, width]) => {
    const picture = draw("svg", { width, height: 16, "aria-hidden": true });
    picture.append(mark);
    return make("li", {}, picture, name);
  }));
  $("scatter-note").textContent = notes.join(" ");
}

const spread = (row, column) => row.spreads[column.index] || 0;

// The four ends of a point's error bars, or none of them.
function ends({ x, y, spread: [across, up] }) {
  const found = [];
  if (across) found.push({ x: x - across, y }, { x: x + across, y });
  if (up) found.push({ x, y: y - up }, { x, y: y + up });
  return found;
}

function pairs(list) { return Array.from({ length: list.length / 2 }, (_, index) => list.slice(2 * index, 2 * index + 2)); }

// The points that no other point beats in x or in y while it equals them in the other.
function front(points, x, y) {
  const [across, up] = [x, y].map(column => (column.better === "lower" ? 1 : -1));
  const found = [];
  for (const point of points.slice().sort((a, b) => across * (a.x - b.x) || up * (a.y - b.y))) {
    const last = found.at(-1);
    if (!last || up * point.y < up * last.y) found.push(point);
  }
  return found;
}

function nearest(event) {
  const box = $("scatter").getBoundingClientRect();
  const [left, top] = [event.clientX - box.left, event.clientY - box.top];
  let found = null, least = 24 ** 2; // the distance at which a tap still selects it
  for (const point of plotted) {
    const away = (point.left - left) ** 2 + (point.top - top) ** 2;
    if (away < least) [found, least] = [point, away];
  }
  return found;
}

function showTip(point) {
  const tip = $("scatter").querySelector(".tip");
  for (const near of $("scatter").querySelectorAll(".near")) near.classList.remove("near");
  tip.hidden = point === null;
  if (point === null) return;
  point.node.classList.add("near");
  tip.textContent = point.about;
  const left = Math.min(point.left + 14, $("scatter").clientWidth - tip.offsetWidth);
  const below = point.top + 14 + tip.offsetHeight < $("scatter").clientHeight;
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${below ? point.top + 14 : Math.max(0, point.top - 14 - tip.offsetHeight)}px`;
}

function showRings() {
  const rings = $("scatter").querySelector(".rings");
  if (rings === null) return;
  rings.replaceChildren();
  for (const point of plotted) {
    const here = letter(point.run);
    point.node.setAttribute("aria-pressed", here !== undefined);
    if (here === undefined) continue;
    rings.append(draw("circle", { class: "ring", cx: point.left, cy: point.top, r: 10 }));
    const side = point.left > $("scatter").clientWidth - 30 ? -1 : 1;
    rings.append(draw("text", { class: "letter", x: point.left + side * 13, y: point.top - 8, "text-anchor": side < 0 ? "end" : "start" }, here));
  }
}

function watchScatter() {
  const node = $("scatter").querySelector("svg");
  node.addEventListener("pointermove", event => showTip(nearest(event)));
  node.addEventListener("pointerleave", () => showTip(null));
  node.addEventListener("click", event => {
    const point = nearest(event);
    if (point) toggle(point.run);
  });
  node.addEventListener("focusin", event => showTip(plotted.find(point => point.node === event.target) ?? null));
  node.addEventListener("focusout", () => showTip(null));
  node.addEventListener("keydown", event => {
    const at = plotted.findIndex(point => point.node === event.target);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? plotted.length - 1 : at + (step ?? 0);
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") toggle(plotted[at].run);
    else if (to === at || !plotted[to]) return;
    else {
      plotted[at].node.setAttribute("tabindex", -1);
      plotted[to].node.setAttribute("tabindex", 0);
      plotted[to].node.focus();
    }
    event.preventDefault();
  });
}

// Selected runs

function toggle(row) { // for an average, all of its runs
  const missing = row.runs.filter(run => !state.selected.includes(run));
  const free = LETTERS.split("").map((_, index) => index).filter(index => !state.selected[index]);
  if (!missing.length) for (const run of row.runs) state.selected[state.selected.indexOf(run)] = undefined;
  missing.slice(0, free.length).forEach((run, index) => { state.selected[free[index]] = run; });
  showSelection(missing.length > free.length ? `${LETTERS.length} runs at most.` : "");
}

function title(run) {
  const score = COLUMN.get("score"), shown = score ? format(score, value(run, score)) : "";
  return `${run.method} ${shown || value(run, COLUMN.get("status"))}`;
}

function badge(run) {
  return make("span", { className: "badge" }, letter(run));
}

function showSelection(note = "") {
  for (const row of rows()) {
    const here = letter(row), whole = here?.length === row.runs.length;
    if (row.check.checked !== whole) row.check.checked = whole;
    if (row.mark.textContent === (here ?? "")) continue;
    row.mark.textContent = here ?? "";
    row.mark.hidden = here === undefined;
    row.line.classList.toggle("chosen", here !== undefined);
  }
  const runs = chosen();
  const chips = runs.map(run => {
    const button = make("button", { type: "button", title: "deselect" }, badge(run), title(run), " ×");
    button.addEventListener("click", () => { toggle(run); $("chips").querySelector("button")?.focus(); });
    return make("li", {}, button);
  });
  if (runs.length) chips.push(make("li", {}, make("a", { href: "#details" }, "Details ↓")));
  if (runs.length > 1) {
    const none = make("button", { type: "button" }, "None");
    none.addEventListener("click", () => { state.selected = []; showSelection(); $("filter").focus(); });
    chips.push(make("li", {}, none));
  }
  $("chips").replaceChildren(...chips);
  $("chips-note").textContent = note || (runs.length ? "" : "Select runs by clicking a point of the scatter or a row of the table. Their training curves appear here, their settings and predictions below.");
  $("details").hidden = runs.length === 0;
  $("curve-controls").hidden = !runs.some(run => run.curves.length);
  showRings();
  drawCurves();
  $("cards").replaceChildren(...runs.map(card));
  drawDifferences();
  drawPredictions();
}

function drawCurves() {
  const runs = chosen(), key = $("curve").value, log = $("curvelog").checked;
  const lines = runs.map(run => {
    const curve = run.curves.find(one => key in one.values);
    const points = (curve?.steps ?? []).map((step, index) => ({ x: step, y: curve.values[key][index] })).filter(point => !log || point.y > 0);
    return { run, points };
  });
  const chart = frame($("curves"), { name: "step", log: false }, { name: key, log }, lines.flatMap(line => line.points));
  const without = lines.filter(line => !line.points.length).map(line => letter(line.run));
  $("curves-note").textContent = without.length && key ? `${without.join(", ")}: no ${key} was logged.` : "";
  if (chart === null) return;
  const ends = [];
  for (const { run, points } of lines.filter(line => line.points.length)) {
    const index = LETTERS.indexOf(letter(run));
    const path = points.map(point => `${chart.x(point.x).toFixed(1)},${chart.y(point.y).toFixed(1)}`).join(" ");
    const dash = DASHES[Math.floor(index / DATA.colours.length) % DASHES.length];
    chart.node.append(draw("polyline", { class: "curve", points: path, stroke: colour(index), "stroke-dasharray": dash }));
    ends.push({ left: chart.x(points.at(-1).x), top: chart.y(points.at(-1).y), text: letter(run) });
  }
  ends.sort((a, b) => a.top - b.top); // letters are placed below each other, and overlap neither each other nor the axis
  ends.forEach((end, index) => { end.top = Math.max(end.top, index ? ends[index - 1].top + 12 : 0); });
  let below = chart.bottom + 6;
  for (const end of ends.reverse()) {
    below = Math.min(end.top, below - 12);
    chart.node.append(draw("text", { class: "letter", x: end.left + 4, y: below + 4 }, end.text));
  }
}

function list(entries) {
  const found = make("dl");
  for (const [key, text] of entries) found.append(make("dt", {}, ...breakable(key)), make("dd", {}, text));
  return found;
}

function card(run) {
  const node = make("article", { className: "card" }, make("h4", {}, badge(run), title(run)));
  for (const axes of run.axes) node.append(list(Object.entries(axes)));
  if (!run.axes.length || run.unfreeze !== "none") node.append(list([["trained in the backbone", run.unfreeze]]));
  if (run.error) node.append(make("p", { className: "fault" }, run.error));
  node.append(list([["seed", shownAs(run, COLUMN.get("seed"))], ["group", DATA.groups[run.group]], ["overrides", run.overrides.join(" ")], ["folder", run.folder]].filter(([, text]) => text)));
  return node;
}

function setting(run, index) {
  const at = run.settings[index];
  return at < 0 ? "–" : DATA.settings.values[index][at];
}

function breakable(key) { // a long key may be broken after a dot or an underscore
  return key.split(/(?<=[._])/).flatMap((part, index) => (index ? [make("wbr"), part] : [part]));
}

function drawDifferences() {
  const runs = chosen(), lone = runs.length === 1;
  const others = lone ? state.shown.filter(run => run !== runs[0]) : runs;
  const rows = [];
  DATA.settings.keys.forEach((key, index) => {
    if (!runs.length || others.every(run => run.settings[index] === runs[0].settings[index])) return;
    const row = make("tr", {}, make("th", { scope: "row" }, ...breakable(key)), ...runs.map(run => make("td", {}, setting(run, index))));
    if (lone) {
      const counted = new Map();
      for (const run of others) counted.set(setting(run, index), (counted.get(setting(run, index)) ?? 0) + 1);
      const most = [...counted].sort((a, b) => b[1] - a[1]);
      const text = most.slice(0, 4).map(([name, times]) => `${name} (${times})`).join(", ");
      row.append(make("td", {}, text + (most.length > 4 ? ` and ${most.length - 4} more` : "")));
    }
    rows.push(row);
  });
  if (!rows.length) {
    $("differences").replaceChildren(make("p", { className: "note" }, others.length ? "None." : "There is no other run to compare with."));
    return;
  }
  const heads = [make("th", { scope: "col" }, "key"), ...runs.map(run => make("th", { scope: "col" }, badge(run), " " + run.method))];
  if (lone) heads.push(make("th", { scope: "col" }, others.length === 1 ? "the other run shown" : `the other ${others.length} runs shown`));
  $("differences").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
}

function drawPredictions() {
  const examples = new Map();
  for (const run of chosen()) {
    for (const [name, reference, prediction] of run.predictions) {
      const key = JSON.stringify([run.group, name, reference]);
      if (!examples.has(key)) examples.set(key, { name, reference, by: [] });
      examples.get(key).by.push([run, prediction]);
    }
  }
  $("predictions").replaceChildren(...[...examples.values()].map(example => {
    const found = make("dl", {}, make("dt", {}, "reference"), make("dd", {}, example.reference));
    for (const [run, prediction] of example.by) {
      const same = prediction === example.reference ? [make("span", { className: "same-as" }, " ✓ same as the reference")] : [];
      found.append(make("dt", {}, badge(run), " " + run.method), make("dd", {}, prediction, ...same));
    }
    return make("div", { className: "example" }, make("p", { className: "note" }, `example ${example.name}`), found);
  }));
  if (!examples.size) $("predictions").replaceChildren(make("p", { className: "note" }, "This report has none."));
}

// The start

function options(select, entries, wanted) {
  select.replaceChildren(...entries.map(([key, name]) => make("option", { value: key, selected: key === wanted }, name)));
}

function start() {
  $("made").textContent = [DATA.words, DATA.made].filter(Boolean).join(" · ");
  if (DATA.words) document.title = `${DATA.words} · peftbench report`;
  const counts = DATA.groups.map((_, index) => RUNS.filter(run => run.group === index).length);
  const groups = DATA.groups.map((name, index) => [String(index), `${name}: ${counts[index]} run${counts[index] === 1 ? "" : "s"}`]);
  options($("group"), [...groups, ...(groups.length > 1 ? [["-1", `all ${RUNS.length} runs`]] : [])], String(Math.max(0, state.group)));
  const same = COLUMNS.filter(column => column.same !== null && ["task", "model", "seed", "status", "device", "debug", "unfreeze", "learning_rate"].includes(column.key));
  $("same").textContent = same.length && RUNS.length > 1 ? `The same in all runs: ${same.map(column => `${column.header} ${format(column, column.same)}`).join(", ")}.` : "";

  const help = $("help").lastElementChild;
  for (const line of [
    "Words that occur in a run's names, axes, error or command line; or conditions on columns, which must all hold:",
    "method=mam,lora   seed!=1   functional_form=relu   device=*H200*   score>60   stored<=200000   functional_form=\"relu + softmax\"",
    `Columns: ${COLUMNS.filter(column => column !== COUNT).map(column => column.key).join(", ")}.`,
  ]) help.append(make("p", {}, line));

  const axis = NUMBERS.map(column => [column.key, column.name]);
  const costs = ["percent", "stored", "trained", "time"].filter(key => COLUMN.get(key) && COLUMN.get(key).form !== "words");
  options($("x"), axis, costs[0]);
  options($("y"), axis, "score");
  options($("by"), COLUMNS.filter(column => column.form === "words" || ["seed", "bottleneck", "learning_rate"].includes(column.key)).map(column => [column.key, column.header]), "method");
  $("xlog").checked = true;
  const curves = [...new Set(RUNS.flatMap(run => run.curves.flatMap(curve => Object.keys(curve.values))))];
  options($("curve"), curves.map(key => [key, key]), "loss");

  $("columns").lastElementChild.append(...COLUMNS.filter(column => column.key !== "method" && column !== COUNT).map(column => {
    const box = make("input", { type: "checkbox", checked: column.shown });
    box.addEventListener("change", () => { column.shown = box.checked; buildTable(); filter(); });
    return make("label", {}, box, column.header);
  }));
  buildTable();
  filter();
  watchScatter();

  let waiting = 0; // filter at most once per animation frame
  $("filter").addEventListener("input", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(filter); });
  $("averaging").hidden = POINTS.length === RUNS.length;
  $("average").addEventListener("change", () => {
    state.averaged = COUNT.shown = $("average").checked;
    for (const row of POINTS) average(row, row.all);
    differences();
    buildTable();
    filter();
  });
  $("group").addEventListener("change", () => { state.group = groups.length > 1 ? Number($("group").value) : -1; filter(); });
  for (const id of ["x", "y", "by", "xlog", "ylog"]) $(id).addEventListener("change", drawScatter);
  for (const id of ["curve", "curvelog"]) $(id).addEventListener("change", drawCurves);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width === innerWidth) return; // a phone's address bar appears and disappears
    width = innerWidth;
    drawScatter();
    drawCurves();
  });
}

start();
