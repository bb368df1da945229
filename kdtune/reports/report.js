"use strict";
// Draws the tables and curves from the JSON in #data. Text only ever enters the page as text.

const data = JSON.parse(document.getElementById("data").textContent);
const WIDTH = 480, HEIGHT = 270, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 40;
// From dense to sparse: of curves that coincide the sparser one is drawn on top, the first and solid one is the widest. Their number
// and that of the markers have no divisor in common, so that 35 rows differ.
const NUM_COLORS = 8, DASHES = ["", "14 4", "9 4 2 4", "6 5", "2 4"];
const MARKERS = [
  "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z", "M-3.2 -3.2H3.2V3.2H-3.2Z", "M0 -4L4 3H-4Z", "M0 -4.5L4.5 0L0 4.5L-4.5 0Z",
  "M0 4L4 -3H-4Z", "M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5", "M0 -4.5V4.5M-4.5 0H4.5",
];
const FEW_POINTS = 16, NUM_MARKERS = 8;
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- Tables: a cell is [text, sort value, detail, class].

function drawTable(table, { header, num_text, lines }) {
  const order = { column: null, down: false };
  const head = element("tr"), body = element("tbody");
  const textClass = (column) => (column < num_text ? "text" : "");
  header.forEach((title, column) => {
    const arrow = element("span", { class: "arrow", "aria-hidden": "true" });
    const button = element("button", { type: "button" }, title, arrow);
    const cell = element("th", { scope: "col", class: textClass(column), "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      order.down = order.column === column ? !order.down : false;
      order.column = column;
      for (const other of head.children) {
        other.setAttribute("aria-sort", "none");
        other.querySelector(".arrow").textContent = "";
      }
      cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      arrow.textContent = order.down ? " ▼" : " ▲";
      fill();
    });
    head.append(cell);
  });
  function fill() {
    const sorted = [...lines];
    if (order.column !== null) sorted.sort((a, b) => compare(a[order.column][1], b[order.column][1], order.down));
    body.replaceChildren(...sorted.map((line) => element("tr", {}, ...line.map(([text, , detail, kind], column) => {
      const cell = element("td", { class: `${textClass(column)} ${kind}`.trim() }, text);
      if (detail) cell.append(element("small", {}, detail));
      return cell;
    }))));
  }
  fill();
  table.replaceChildren(element("thead", {}, head), body);
}

function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  return down ? -order : order;
}

// ---- Curves.

const state = { hidden: new Set(), window: 1, seeds: false, range: null };
const drawnRows = [...new Set(data.curves.map((curve) => curve.row))].sort((a, b) => a - b);
const place = new Map(drawnRows.map((row, index) => [row, index]));
const panels = [];

const color = (row) => `var(--c${place.get(row) % NUM_COLORS})`;
const level = (row) => place.get(row) % DASHES.length;
const shape = (row) => place.get(row) % MARKERS.length;
const stroke = (row) => `stroke="${color(row)}" stroke-dasharray="${DASHES[level(row)]}"`;
const mark = (row, x, y) => `<path class="mark" stroke="${color(row)}" transform="translate(${x} ${y})" d="${MARKERS[shape(row)]}"/>`;
// A curve of many points has a few markers, at other steps than the next curve's.
function marked(points, row) {
  const every = points.length > FEW_POINTS ? Math.ceil(points.length / NUM_MARKERS) : 1;
  return points.filter((_, index) => index % every === Math.floor((shape(row) * every) / MARKERS.length));
}

function smooth(values, window) {
  let sum = 0;
  return values.map((value, index) => {
    sum += value - (index >= window ? values[index - window] : 0);
    return sum / Math.min(index + 1, window);
  });
}

// Mean over the seeds of a row at every step that all of them have, and its standard error.
function rowLines({ metric, rows }) {
  const training = !metric.startsWith("val_");
  return drawnRows.filter((row) => rows.includes(row) && !state.hidden.has(row)).map((row) => {
    const seeds = data.curves.filter((curve) => curve.row === row && curve.metric === metric).map((curve) => {
      const values = training ? smooth(curve.values, state.window) : curve.values;
      return { seed: curve.seed, points: new Map(curve.steps.map((step, index) => [step, values[index]])) };
    });
    if (!seeds.length) return null;
    const points = [...seeds[0].points.keys()].filter((step) => seeds.every((one) => one.points.has(step))).map((step) => {
      const values = seeds.map((one) => one.points.get(step));
      const mean = values.reduce((a, b) => a + b, 0) / values.length;
      const variance = values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1);
      return { step, mean, error: values.length > 1 ? Math.sqrt(variance / values.length) : 0 };
    });
    return { row, seeds, points };
  }).filter(Boolean);
}

function ticks(low, high, count) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function drawPanel(panel) {
  const lines = rowLines(panel);
  const [x0, x1] = state.range || fullRange();
  const inside = ({ step }) => step >= x0 && step <= x1;
  const heights = lines.flatMap((line) => [
    ...line.points.filter(inside).flatMap(({ mean, error }) => [mean - error, mean + error]),
    ...(state.seeds ? line.seeds.flatMap((one) => [...one.points].filter(([step]) => inside({ step })).map(([, v]) => v)) : []),
  ]);
  const low = heights.length ? Math.min(...heights) : 0, high = heights.length ? Math.max(...heights) : 1;
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  const y0 = low - margin, y1 = high + margin;
  const x = (step) => LEFT + ((step - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((y1 - value) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  Object.assign(panel, { lines, x, x0, x1 });

  const path = (points) => points.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const xs = ticks(x0, x1, 6), ys = ticks(y0, y1, 5);
  // Only numbers and names of ours go into this markup.
  const axis = [
    ...xs.found.map((value) => `<line class="grid" x1="${x(value)}" x2="${x(value)}" y1="${TOP}" y2="${HEIGHT - BOTTOM}"/>
      <text x="${x(value)}" y="${HEIGHT - BOTTOM + 17}" text-anchor="middle">${value.toFixed(xs.digits)}</text>`),
    ...ys.found.map((value) => `<line class="grid" x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y(value)}" y2="${y(value)}"/>
      <text x="${LEFT - 7}" y="${y(value) + 4}" text-anchor="end">${value.toFixed(ys.digits)}</text>`),
    `<path class="frame" fill="none" d="M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}"/>
     <text x="${(LEFT + WIDTH - RIGHT) / 2}" y="${HEIGHT - 5}" text-anchor="middle">optimizer step</text>`,
  ];
  const curves = [...lines].sort((a, b) => level(a.row) - level(b.row)).map((line) => {
    const style = stroke(line.row), width = level(line.row) ? 1.8 : 3;
    const upper = line.points.map(({ step, mean, error }) => [step, mean + error]);
    const lower = line.points.map(({ step, mean, error }) => [step, mean - error]).reverse();
    const band = line.seeds.length > 1 ? `<path class="band" fill="${color(line.row)}" d="${path([...upper, ...lower])}Z"/>` : "";
    const thin = state.seeds ? line.seeds.map((one) => `<path class="thin" ${style} d="${path([...one.points])}"/>`).join("") : "";
    const marks = marked(line.points, line.row).map((p) => mark(line.row, x(p.step).toFixed(1), y(p.mean).toFixed(1))).join("");
    const points = path(line.points.map((p) => [p.step, p.mean]));
    return `${band}${thin}<path class="curve" ${style} stroke-width="${width}" data-row="${line.row}" d="${points}"/>${marks}`;
  });
  const clip = `clip-${panels.indexOf(panel)}`;
  panel.svg.innerHTML = `<clipPath id="${clip}"><rect x="${LEFT - 5}" y="0" width="${WIDTH - LEFT - RIGHT + 10}" height="${HEIGHT - BOTTOM + 5}"/></clipPath>
    ${axis.join("")}<g clip-path="url(#${clip})">${curves.join("")}</g>
    <rect class="brush" y="${TOP}" height="${HEIGHT - TOP - BOTTOM}" width="0"/>
    <line class="cursor" y1="${TOP}" y2="${HEIGHT - BOTTOM}" visibility="hidden"/>`;
}

function fullRange() {
  const steps = data.curves.flatMap((curve) => [curve.steps[0], curve.steps[curve.steps.length - 1]]);
  return [Math.min(...steps), Math.max(...steps)];
}

const drawAll = () => panels.forEach(drawPanel);

function pointerStep(panel, event) {
  const box = panel.svg.getBoundingClientRect();
  const scale = Math.min(box.width / WIDTH, box.height / HEIGHT);
  const inside = (event.clientX - box.left - (box.width - WIDTH * scale) / 2) / scale;
  const share = (inside - LEFT) / (WIDTH - LEFT - RIGHT);
  return panel.x0 + Math.min(1, Math.max(0, share)) * (panel.x1 - panel.x0);
}

function showTooltip(panel, event) {
  const wanted = pointerStep(panel, event);
  const near = panel.lines.map((line) => {
    const point = line.points.reduce((best, one) => (Math.abs(one.step - wanted) < Math.abs(best.step - wanted) ? one : best));
    return { line, point };
  });
  const tooltip = byId("tooltip"), cursor = panel.svg.querySelector(".cursor");
  tooltip.hidden = !near.length;
  if (!near.length) return;
  const step = near.reduce((best, { point }) => (Math.abs(point.step - wanted) < Math.abs(best - wanted) ? point.step : best), Infinity);
  cursor.setAttribute("x1", panel.x(step));
  cursor.setAttribute("x2", panel.x(step));
  cursor.setAttribute("visibility", "visible");
  const shown = near.filter(({ point }) => point.step === step).sort((a, b) => b.point.mean - a.point.mean);
  tooltip.replaceChildren(element("strong", {}, `step ${Number(step.toFixed(1))}`), ...shown.map(({ line, point }) => {
    const name = element("i", {}, data.rows[line.row]);
    name.style.color = color(line.row);
    const error = line.seeds.length > 1 ? ` ± ${point.error.toPrecision(2)}` : "";
    return element("div", {}, name, element("b", {}, `${point.mean.toPrecision(5)}${error}`));
  }));
  const box = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.max(4, event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 12 : event.clientX + 16)}px`;
  tooltip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 6))}px`;
}

function addPanel({ metric, title, unit, rows }) {
  const box = element("div", { class: "panel" }, element("h3", {}, `${title} (${unit})`));
  box.insertAdjacentHTML("beforeend", `<svg role="img" viewBox="0 0 ${WIDTH} ${HEIGHT}"></svg>`);
  const panel = { metric, rows, svg: box.querySelector("svg") };
  panel.svg.setAttribute("aria-label", `${title} over the optimizer steps, a line for each row; the tables hold the final values`);
  let start = null;
  panel.svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = pointerStep(panel, event);
    panel.svg.setPointerCapture(event.pointerId);
  });
  panel.svg.addEventListener("pointermove", (event) => {
    showTooltip(panel, event);
    if (start === null) return;
    const ends = [start, pointerStep(panel, event)].map(panel.x).sort((a, b) => a - b);
    const brush = panel.svg.querySelector(".brush");
    brush.setAttribute("x", ends[0]);
    brush.setAttribute("width", ends[1] - ends[0]);
  });
  const release = (event) => {
    if (start === null) return;
    const ends = [start, pointerStep(panel, event)].sort((a, b) => a - b);
    start = null;
    if (event.type === "pointerup" && panel.x(ends[1]) - panel.x(ends[0]) > 4) state.range = ends;
    drawAll();
  };
  panel.svg.addEventListener("pointerup", release);
  panel.svg.addEventListener("pointercancel", release);
  panel.svg.addEventListener("pointerleave", () => {
    byId("tooltip").hidden = true;
    panel.svg.querySelector(".cursor").setAttribute("visibility", "hidden");
  });
  panel.svg.addEventListener("dblclick", resetZoom);
  panels.push(panel);
  byId("panels").append(box);
}

function resetZoom() {
  state.range = null;
  drawAll();
}

function drawLegend() {
  byId("legend").replaceChildren(...drawnRows.map((row) => {
    const button = element("button", { type: "button", "aria-pressed": String(!state.hidden.has(row)) });
    button.innerHTML = `<svg viewBox="0 0 38 10" aria-hidden="true"><line x1="0" x2="38" y1="5" y2="5"
      stroke-width="${level(row) ? 1.8 : 3}" ${stroke(row)}/>${mark(row, 19, 5)}</svg>`;
    button.append(data.rows[row]);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(row)) state.hidden.add(row);
      button.setAttribute("aria-pressed", String(!state.hidden.has(row)));
      drawAll();
    });
    return button;
  }));
}

function drawCurves() {
  const longest = Math.max(...data.curves.map((curve) => curve.values.length));
  const windows = [1, 5, 10, 25, 50, 100].filter((window) => window === 1 || window <= longest / 2);
  const usual = windows.filter((window) => window <= longest / 20).pop() || 1;
  state.window = usual;
  byId("window").replaceChildren(...windows.map((window) => {
    const option = element("option", { value: window }, window === 1 ? "none" : `mean of last ${window} points`);
    option.selected = window === usual;
    return option;
  }));
  const hasSeeds = data.curves.some((curve) => curve.seed !== null);
  const seeds = hasSeeds ? " Lines are means over seeds, bands ± one standard error." : "";
  const note = () => {
    const bin = Math.max(...data.curves.map((curve) => curve.bin));
    const kind = state.window > 1 ? `Training curves are means of the last ${state.window} points. ` : "Training curves are not smoothed. ";
    const thinned = bin > 1 ? `A point is the mean of up to ${bin} logged steps. ` : "";
    byId("curve-note").textContent = `${kind}${thinned}Held-out values are as measured.${seeds}`;
  };
  const redraw = () => { note(); drawAll(); };
  byId("window").addEventListener("change", (event) => { state.window = Number(event.target.value); redraw(); });
  byId("seeds").addEventListener("change", (event) => { state.seeds = event.target.checked; redraw(); });
  byId("show-all").addEventListener("click", () => { state.hidden.clear(); drawLegend(); redraw(); });
  byId("show-none").addEventListener("click", () => { drawnRows.forEach((row) => state.hidden.add(row)); drawLegend(); redraw(); });
  byId("reset").addEventListener("click", resetZoom);
  data.panels.filter(({ metric, rows }) => data.curves.some((curve) => curve.metric === metric && rows.includes(curve.row)))
    .forEach(addPanel);
  drawLegend();
  redraw();
}

if (data.summary.lines.length) {
  byId("results").hidden = false;
  drawTable(byId("summary"), data.summary);
}
if (data.cells.lines.length) {
  byId("all-cells").hidden = false;
  drawTable(byId("cells"), data.cells);
}
if (data.curves.length) {
  byId("curves").hidden = false;
  drawCurves();
}
