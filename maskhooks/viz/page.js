"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("depth"), shown = document.getElementById("shown");
const tip = document.getElementById("tip"), search = document.getElementById("search");
const height = data.rows.length > 16 ? 9 : 13, gap = 1;
const visible = text => text.trim() ? text.replace(/[\n\r]+/g, "↵").replace(/\t/g, "⇥")
  : text.replace(/[\n\r]/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
const theme = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function make(tag, parent, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  parent.append(node);
  return node;
}

// SVG elements need the SVG namespace; read it from a parsed element, so that the page contains no URL.
const drawing = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;
function shape(tag, parent, settings, text) {
  const node = document.createElementNS(drawing, tag);
  Object.entries(settings).forEach(([name, value]) => node.setAttribute(name, value));
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// Node shapes by type; "" is a circle.
const SHAPES = ["", "M-1 -1H1V1H-1Z", "M0 -1.3L1.3 0L0 1.3L-1.3 0Z", "M0 -1.3L1.2 .9H-1.2Z"];

// Draw a graph; its edges replace tokens and are coloured like them.
function network(card, { graph, columns }) {
  const size = 440, margin = 22, at = value => (margin + value * (size - 2 * margin)).toFixed(1);
  const box = shape("svg", card, { class: "network", viewBox: `0 0 ${size} ${size}`, role: "img",
    "aria-label": "A graph, its edges coloured by score" });
  const small = graph.nodes.length > 40 ? Math.max(.35, Math.sqrt(40 / graph.nodes.length)) : 1;
  box.style.setProperty("--small", small);
  const arrows = shape("g", box, {}), lines = shape("g", box, {}), dots = shape("g", box, {});
  const spans = graph.lines.map(([x1, y1, x2, y2], index) => {
    if (graph.loop[index]) {
      return shape("circle", lines, { class: "edge", cx: at(x1), cy: at(y1 - .022), r: (9 * small).toFixed(1) });
    }
    return shape("line", lines, { class: "edge", x1: at(x1), y1: at(y1), x2: at(x2), y2: at(y2) });
  });
  graph.arrow.forEach((is, index) => {
    if (!is) return;
    const [x1, y1, x2, y2] = graph.lines[index];
    const turn = Math.atan2(y2 - y1, x2 - x1) * 180 / Math.PI, [x, y] = [at(x1 + .6 * (x2 - x1)), at(y1 + .6 * (y2 - y1))];
    spans[index].tip = shape("path", arrows, { class: "tip", d: "M-4 -4L5 0L-4 4Z",
      transform: `translate(${x} ${y}) rotate(${turn.toFixed(1)}) scale(${small.toFixed(2)})` });
  });
  const named = graph.names.some(Boolean);
  graph.nodes.forEach(([x, y], index) => {
    const own = index === graph.target ? "node target" : "node";
    const size = (named ? 9 : 4) * small;
    if (graph.shapes[index]) {
      shape("path", dots, { class: own, d: SHAPES[graph.shapes[index]], "vector-effect": "non-scaling-stroke",
        transform: `translate(${at(x)} ${at(y)}) scale(${size.toFixed(1)})` });
    } else shape("circle", dots, { class: own, cx: at(x), cy: at(y), r: size.toFixed(1) });
    if (graph.names[index]) shape("text", dots, { x: at(x), y: at(y) }, visible(graph.names[index]));
  });
  return spans;
}

function build(example) {
  const card = make("article", document.getElementById("cards"));
  const about = make("div", card, undefined, "about");
  make("h3", about, `Example ${example.number}`);
  const known = Object.fromEntries(example.metadata);
  const values = example.metadata.map(([name, text]) => make("b", make("span", about, `${name} `), text));
  if ("target" in known && "prediction" in known && known.target !== known.prediction) {
    card.classList.add("differs");
    make("span", about, "≠").title = "prediction and target differ";
  }
  const tokens = example.graph ? undefined : make("div", card, undefined, "tokens");
  if (example.width) {
    tokens.classList.add("patches");
    tokens.style.gridTemplateColumns = `repeat(${example.width}, 18px)`;
  }
  const spans = example.graph ? network(card, example)
    : example.columns.map((text, index) => {
      const patch = index < example.patches;
      return make("span", tokens, patch ? "" : visible(text), example.patches && !patch ? "beside" : "");
    });
  const room = Math.floor((Math.min(innerWidth, 1080) - 120) / example.columns.length);
  const view = { example, card, spans, searched: [...spans, ...values], cell: Math.max(4, Math.min(16, room)) };
  view.text = searchable(example);
  const drawn = !example.width && !example.graph;
  if (data.rows.length > 1 && (drawn || example.totals.length)) {
    const figure = make("figure", card);
    figure.style.setProperty("--height", `${height}px`);
    view.items = upwards(figure, data.rows.map(name => [name]));
    view.items[0].parentElement.setAttribute("aria-hidden", "true");
    if (drawn) {
      view.canvas = make("canvas", figure);
      view.canvas.setAttribute("role", "img");
      view.canvas.setAttribute("aria-label", `${data.label} of each position at each depth, the deepest at the top`);
    }
    if (example.totals.length) upwards(figure, example.totals.map(([length, text]) => [text, length]), "totals");
  }
  return view;
}

// A list with the first entry at the bottom; an entry with a length begins with a bar.
function upwards(parent, entries, name) {
  const list = make("ol", parent, undefined, name);
  const items = entries.map(([text, length]) => {
    const item = make("li", list);
    if (length !== undefined) make("i", item).style.setProperty("--length", length);
    item.append(text);
    return item;
  });
  list.append(...items.slice().reverse());
  return items;
}

// The text that a search covers: tokens, the words they form, and the example's metadata.
function searchable({ number, columns, metadata }) {
  const spaced = columns.join(" ");
  const texts = [`example ${number}`, spaced, spaced.replaceAll(" ##", ""), columns.join("").replace(/[Ġ▁]/g, " ")];
  return lower([...texts, ...metadata.map(([, text]) => text)].join("\n"));
}

const lower = text => text.toLocaleLowerCase();

function filter() {
  const words = lower(search.value).split(/\s+/).filter(Boolean);
  let count = 0;
  views.forEach(view => {
    const hit = words.every(word => view.text.includes(word));
    count += hit;
    view.card.hidden = !hit;
    view.searched.forEach(node =>
      node.classList.toggle("hit", hit && words.some(word => lower(node.textContent).includes(word))));
  });
  document.getElementById("found").textContent = `${count} of ${views.size}`;
}

function colour(view, row) {
  const change = Number(theme("--switch"));
  view.spans.forEach((span, column) => {
    const score = view.example.scores[row]?.[column] ?? null;
    span.classList.toggle("none", score === null);
    span.classList.toggle("on", Math.abs(score) / data.top > change);
    span.classList.toggle("below", score < 0);
    span.classList.toggle("kept", data.threshold !== null && score > data.threshold);
    span.style.setProperty("--score", Math.abs(score ?? 0) / data.top);
    span.tip?.style.setProperty("--score", Math.abs(score ?? 0) / data.top);
    span.tip?.classList.toggle("below", score < 0);
  });
  view.items?.forEach((item, index) => item.classList.toggle("now", index === row));
}

function draw(view, row) {
  if (!view.canvas) return;
  const { canvas, cell, example } = view, rows = data.rows.length, scale = window.devicePixelRatio || 1;
  canvas.width = cell * example.columns.length * scale;
  canvas.height = height * rows * scale;
  canvas.style.width = `${cell * example.columns.length}px`;
  canvas.style.height = `${height * rows}px`;
  const pen = canvas.getContext("2d"), accent = theme("--accent"), below = theme("--below");
  pen.scale(scale, scale);
  example.scores.forEach((line, index) => line.forEach((score, column) => {
    if (score === null) return;
    const box = [column * cell, (rows - 1 - index) * height, cell - (cell > 5 ? gap : 0), height - gap];
    pen.fillStyle = "rgb(127 140 160 / .12)";
    pen.fillRect(...box);
    pen.fillStyle = `rgb(${score < 0 ? below : accent} / ${Math.abs(score) / data.top})`;
    pen.fillRect(...box);
  }));
  pen.strokeStyle = theme("--text");
  pen.lineWidth = 1.5;
  pen.strokeRect(.75, (rows - 1 - row) * height + .25, cell * example.columns.length - 1.5 - gap, height - 1.5);
}

// The name of one depth, or of all.
const called = name => /^\d/.test(name) ? `depth ${name}` : name;

function say(event, view, row, column) {
  const score = view.example.scores[row]?.[column] ?? null;
  const digits = data.top >= 100 ? 0 : 3;
  tip.textContent = `${visible(view.example.columns[column])}   ${called(data.rows[row])}   `
    + (score === null ? "no score" : `${data.label} ${score.toFixed(digits)}`);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}

function listen(view) {
  view.card.addEventListener("pointermove", event => {
    view.spans.forEach(span => span.classList.remove("lit"));
    tip.hidden = true;
    const column = view.spans.indexOf(event.target);
    if (column >= 0) say(event, view, now(), column);
    if (event.target === view.canvas) {
      const [row, column] = place(view, event);
      if (view.spans[column] && data.rows[row] !== undefined) {
        view.spans[column].classList.add("lit");
        say(event, view, row, column);
      }
    }
  });
  view.card.addEventListener("pointerleave", () => {
    tip.hidden = true;
    view.spans.forEach(span => span.classList.remove("lit"));
  });
  view.card.addEventListener("click", event => {
    const row = event.target === view.canvas ? place(view, event)[0] : (view.items ?? []).indexOf(event.target);
    if (data.rows[row] === undefined) return;
    slider.value = row;
    update();
  });
}

function place(view, event) {
  const row = data.rows.length - 1 - Math.floor(event.offsetY / height);
  return [row, Math.floor(event.offsetX / view.cell)];
}

const now = () => Number(slider.value);
const near = new Set();
const show = view => { colour(view, now()); draw(view, now()); };

function update() {
  const name = data.rows[now()] ?? "";
  shown.textContent = /^\d+$/.test(name) && data.rows.length > 1 ? `${name} of ${data.rows.at(-1)}` : name;
  slider.setAttribute("aria-valuetext", called(name));
  near.forEach(show);
}

const views = new Map(data.examples.map(example => build(example)).map(view => [view.card, view]));
const watch = new IntersectionObserver(entries => entries.forEach(({ target, isIntersecting }) => {
  const view = views.get(target);
  near[isIntersecting ? "add" : "delete"](view);
  if (isIntersecting) show(view);
}), { rootMargin: "600px" });
// On a large page, colour only the examples near the viewport.
const many = data.examples.reduce((sum, example) => sum + example.columns.length, 0) > 4000;
views.forEach(view => {
  listen(view);
  if (many) watch.observe(view.card);
  else near.add(view);
});
slider.disabled = data.rows.length < 2;
slider.addEventListener("input", update);
search.addEventListener("input", filter);
document.addEventListener("keydown", event => {
  if (event.key === "/" && !event.target.matches("input") && !search.parentElement.hidden) {
    event.preventDefault();
    search.focus();
  }
  if (event.key === "Escape" && search.value) {
    search.value = "";
    filter();
  }
});
addEventListener("beforeprint", () => views.forEach(show));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
document.getElementById("provenance").textContent = JSON.stringify(data.provenance, null, 2);
update();
filter();
