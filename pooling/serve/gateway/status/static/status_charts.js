// Drawing: the memory map and the turn timeline on canvas, sparklines as SVG.
"use strict";

const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (`data-`, `aria-`) and children; text is never read as markup. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value == null || value === false) continue;
    if (key.includes("-") || key === "role") node.setAttribute(key, value === true ? "" : value);
    else node[key] = value;
  }
  node.append(...children.filter((c) => c != null));
  return node;
}

const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
};

/** A colour of the style sheet as the browser resolves it, for canvas. */
function ink(name) {
  const probe = $("tip");
  probe.style.outlineColor = `var(--${name})`;
  return getComputedStyle(probe).outlineColor;
}

function modelColour(index, alpha = 1) {
  return isDark() ? `hsl(${hueOf(index)} 38% 62% / ${alpha})` : `hsl(${hueOf(index)} 42% 48% / ${alpha})`;
}
const USE_ALPHA = { weights: 1, kv: 0.58, idle: 0.24 };
const USE_INK = { weights: "use-weights", kv: "use-kv", idle: "use-idle", null: "null", free: "free" };
const USE_NAME = { weights: "weights", kv: "KV in use", idle: "KV idle", null: "null blocks", free: "free" };

function cellColour(segment, by, indexOf) {
  if (segment.model == null || by === "use") return ink(USE_INK[segment.use]);
  return modelColour(indexOf(segment.model), USE_ALPHA[segment.use]);
}

/** A canvas of the width of its parent, sharp on any screen; returns its context, in CSS pixels. */
function contextOf(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return context;
}

/** Draw the pages of one device as blocks in reading order; returns what lies at a point. */
function drawMemory(canvas, memory, by, indexOf, lit) {
  const width = canvas.parentElement.clientWidth;
  const gap = 2, least = width < 500 ? 9 : 11, most = 22;
  const size = Math.max(least, Math.min(most, Math.floor(width / Math.max(1, memory.total)) - gap));
  const columns = Math.max(8, Math.floor((width + gap) / (size + gap)));
  const segments = cellsOf(memory, Math.min(columns * (width < 500 ? 10 : 6), 720));
  const count = sum(segments.map((s) => s.cells));
  const g = contextOf(canvas, width, Math.ceil(count / columns) * (size + gap));
  const owners = [];
  const line = ink("line"), text = ink("text");
  for (const s of segments) {
    const colour = cellColour(s, by, indexOf);
    for (let i = 0; i < s.cells; i++) {
      const x = (owners.length % columns) * (size + gap), y = Math.floor(owners.length / columns) * (size + gap);
      g.fillStyle = colour;
      g.fillRect(x, y, size, size);
      if (s.use === "free" || (lit && s.model === lit)) {
        g.strokeStyle = s.use === "free" ? line : text;
        g.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
      }
      owners.push(s);
    }
  }
  return (x, y) => {
    const column = Math.floor(x / (size + gap));
    return column < columns ? owners[Math.floor(y / (size + gap)) * columns + column] : undefined;
  };
}

const LANES = 12, LANE = 15, DEVICE_LANE = 26, AXIS = 18;
const COPIES_IN = ["weights_in", "kv_in", "weights_from_disk"], COPIES_OUT = ["weights_out", "kv_out"];

/** Draw one device: who had it, all models stacked, then a lane for each of the busiest; returns shares of the time. */
function drawTurns(canvas, spans, from, to, indexOf) {
  const width = canvas.parentElement.clientWidth, gutter = width < 500 ? 74 : 130;
  const num = Math.max(40, Math.floor(width - gutter));
  const turns = coverage(spans, ["turn"], from, to, num), waits = coverage(spans, ["switch"], from, to, num);
  const moved = { in: coverage(spans, COPIES_IN, from, to, num), out: coverage(spans, COPIES_OUT, from, to, num) };
  const share = (columns) => sum(columns ?? []) / num;
  const names = [...new Set([...turns.keys(), ...waits.keys(), ...moved.in.keys(), ...moved.out.keys()])];
  names.sort((a, b) => share(turns.get(b)) - share(turns.get(a)));
  const shown = names.slice(0, LANES).sort((a, b) => indexOf(a) - indexOf(b));
  const g = contextOf(canvas, width, DEVICE_LANE + 8 + Math.max(1, shown.length) * LANE + AXIS);
  const muted = ink("muted"), line = ink("line"), wait = ink("wait"), text = ink("text");
  g.font = "12px system-ui, 'Liberation Sans', sans-serif";
  g.textBaseline = "middle";
  g.fillStyle = ink("free");
  g.fillRect(gutter, 0, num, DEVICE_LANE);
  const order = [...turns.keys()].sort((a, b) => indexOf(a) - indexOf(b));
  for (let i = 0; i < num; i++) {
    let y = DEVICE_LANE;
    const stack = (part, colour) => {
      const height = Math.min(y, part * DEVICE_LANE);
      if (height < 0.2) return;
      g.fillStyle = colour;
      g.fillRect(gutter + i, y - height, 1, height);
      y -= height;
    };
    for (const name of order) stack(turns.get(name)[i], modelColour(indexOf(name)));
    for (const columns of waits.values()) stack(columns[i], wait);
  }
  g.fillStyle = text;
  g.fillText("device", 0, DEVICE_LANE / 2);
  shown.forEach((name, row) => {
    const top = DEVICE_LANE + 8 + row * LANE;
    g.fillStyle = muted;
    g.fillText(clipped(g, name, gutter - 10), 0, top + LANE / 2 - 1);
    g.fillStyle = line;
    g.fillRect(gutter, top + LANE - 2, num, 1);
    bars(g, turns.get(name), gutter, top, 8, modelColour(indexOf(name)));
    bars(g, waits.get(name), gutter, top, 8, wait);
    bars(g, moved.in.get(name), gutter, top + 9, 3, ink("copy-in"));
    bars(g, moved.out.get(name), gutter, top + 9, 3, ink("copy-out"));
  });
  axis(g, gutter, num, DEVICE_LANE + 8 + Math.max(1, shown.length) * LANE, to - from, muted, line);
  const rest = names.length - shown.length;
  return {
    models: names.map((n) => [n, share(turns.get(n))]), rest,
    waiting: Math.min(1, sum([...waits.values()].map(share))), busy: Math.min(1, sum([...turns.values()].map(share))),
  };
}

/** Columns as one-pixel bars; a short event stays visible. */
function bars(g, columns, left, top, height, colour) {
  if (!columns) return;
  g.fillStyle = colour;
  columns.forEach((share, i) => {
    if (share <= 0) return;
    g.globalAlpha = Math.min(1, 0.3 + 0.7 * share);
    g.fillRect(left + i, top, 1, height);
  });
  g.globalAlpha = 1;
}

function axis(g, left, width, top, spanS, muted, line) {
  const steps = width < 400 ? 2 : 5;
  g.fillStyle = line;
  g.fillRect(left, top, width, 1);
  g.fillStyle = muted;
  for (let i = 0; i <= steps; i++) {
    const ago = spanS * (1 - i / steps), x = left + (width * i) / steps;
    g.textAlign = i === 0 ? "left" : i === steps ? "right" : "center";
    g.fillText(ago ? `\u2212${Number.isInteger(ago) ? ago : ago.toFixed(1)} s` : "now", x, top + 10);
  }
  g.textAlign = "left";
}

/** A text cut in its middle: names of models of a kind differ at their ends. */
function clipped(g, text, width) {
  if (g.measureText(text).width <= width) return text;
  let left = Math.ceil(text.length / 2), right = left;
  const cut = () => `${text.slice(0, left)}\u2026${text.slice(right)}`;
  while (left > 0 && g.measureText(cut()).width > width) {
    if (left > text.length - right) left--; else right++;
  }
  return cut();
}

const SVG = "http://www.w3.org/2000/svg";

/** A sparkline of values from 0 to `top`; gaps where a value is null. */
function spark(node, values, top) {
  const points = values.slice(-120), step = 100 / Math.max(1, points.length - 1);
  let path = "", pen = "M";
  points.forEach((v, i) => {
    if (v == null) { pen = "M"; return; }
    path += `${pen}${(i * step).toFixed(1)} ${(20 - 18 * Math.min(1, v / (top || 1)) - 1).toFixed(1)}`;
    pen = "L";
  });
  node.firstChild.setAttribute("d", path);
}

function sparkNode() {
  const node = document.createElementNS(SVG, "svg");
  node.setAttribute("class", "spark");
  node.setAttribute("viewBox", "0 0 100 20");
  node.setAttribute("preserveAspectRatio", "none");
  node.setAttribute("aria-hidden", "true");
  node.append(document.createElementNS(SVG, "path"));
  return node;
}
