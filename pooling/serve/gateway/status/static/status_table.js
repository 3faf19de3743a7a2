// The table of models: one row each, kept from poll to poll so that focus and selection stay.
"use strict";

const latency = (l) => (l ? `${seconds(l.p50)} / ${seconds(l.p99)}` : DASH);
const COLUMNS = [
  { key: "index", name: "Model", text: true, of: (r) => r.name },
  { key: "state", name: "State", text: true, of: (r) => stateOf(r).word },
  { key: "running", name: "Running", of: (r) => r.running },
  { key: "waiting", name: "Waiting", of: (r) => r.waiting },
  { key: "goodput", name: "Goodput tok/s", of: (r) => r.goodput, spark: true },
  { key: "onTime", name: "On time", of: (r) => (r.hasSlo ? poolHistory.attainment(r)?.share ?? 2 : 3), spark: true },
  { key: "ttft", name: "TTFT p50 / p99", of: (r) => r.ttft?.p99 ?? -1, wide: true },
  { key: "tpot", name: "TPOT p50 / p99", of: (r) => r.tpot?.p99 ?? -1, wide: true },
  { key: "weights", name: "Weights", of: (r) => r.weightBytes },
  { key: "kv", name: "KV pages", of: (r) => r.kvPages },
  { key: "device", name: "Device time", of: (r) => poolHistory.deviceShare(r.name) ?? -1 },
];
const tableRows = new Map();

function buildTable() {
  const row = document.querySelector("#models thead tr");
  for (const column of COLUMNS) {
    const button = el("button", { type: "button" }, column.name);
    button.onclick = () => {
      view.sort = view.sort === column.key ? `-${column.key}` : column.key;
      $("sort").value = "";
      show();
    };
    row.append(el("th", { scope: "col", className: column.text ? "text" : "", "data-key": column.key }, button));
    $("sort").append(el("option", { value: column.key }, column.name));
  }
  $("sort").addEventListener("change", (event) => { view.sort = event.target.value; });
}

/** Rows by the chosen column: names rise, figures fall, and the other way round on the second press. */
function sorted(rows) {
  const back = view.sort.startsWith("-"), column = COLUMNS.find((c) => c.key === view.sort.replace("-", ""));
  const rises = column.text !== undefined || column.key === "onTime";
  const sign = rises === back ? -1 : 1;
  const of = column.key === "index" ? (r) => r.index : column.of;
  return [...rows].sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y) || a.index - b.index;
  });
}

function showModels(rows) {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = sorted(rows.filter((r) => r.name.toLowerCase().includes(wanted)));
  for (const th of document.querySelectorAll("#models th")) {
    const falls = view.sort.startsWith("-");
    const column = COLUMNS.find((c) => c.key === th.dataset.key);
    const rises = (column.text !== undefined || column.key === "onTime") !== falls;
    if (view.sort.replace("-", "") === column.key) th.setAttribute("aria-sort", rises ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  }
  const body = document.querySelector("#models tbody");
  for (const [name, node] of tableRows) if (!rows.some((r) => r.name === name)) { node.remove(); tableRows.delete(name); }
  const nodes = found.map((r) => fillRow(r));
  if (nodes.length !== body.children.length || nodes.some((n, i) => n !== body.children[i])) body.replaceChildren(...nodes);
  const empty = $("models-empty");
  empty.hidden = found.length > 0;
  empty.textContent = rows.length ? `No model's name contains \u201c${wanted}\u201d.` : "The pool has no models. POST /v1/pool/models adds one.";
}

function newRow(r) {
  const cells = COLUMNS.map((c) => el("td", { className: c.text ? "text" : c.wide ? "wide" : "", "data-label": c.key === "index" ? null : c.name }));
  const node = el("tr", {}, ...cells);
  cells.forEach((cell, i) => { if (COLUMNS[i].spark) cell.append(el("span"), sparkNode()); });
  node.onmouseenter = () => { view.lit = r.name; redrawMemory(); };
  node.onmouseleave = () => { view.lit = null; redrawMemory(); };
  tableRows.set(r.name, node);
  return node;
}

function redrawMemory() {
  if (view.state) showMemory(hostsOf(view.state), rowsOf(view.state));
}

function fillRow(r) {
  const node = tableRows.get(r.name) ?? newRow(r);
  const [name, state, running, waiting, goodput, onTime, ttft, tpot, weights, kv, device] = node.children;
  const mark = el("i", { className: "chip", "aria-hidden": "true" });
  mark.style.background = modelColour(r.index);
  name.replaceChildren(mark, el("b", { title: r.checkpoint }, r.name), r.hasTurn ? el("span", { className: "has-turn", title: "has the device now" }, "\u25b6 turn") : "");
  const s = stateOf(r);
  state.replaceChildren(el("span", { className: "state" }, el("i", { className: `dot ${s.tone}`, "aria-hidden": "true" }), s.word, s.detail ? el("small", {}, s.detail) : ""));
  running.textContent = r.running;
  waiting.textContent = r.waiting;
  const series = poolHistory.series(r.name, "goodput");
  goodput.firstChild.textContent = rate(r.goodput);
  spark(goodput.lastChild, series, Math.max(1, ...series));
  showAttainment(onTime, r);
  ttft.textContent = latency(r.ttft);
  tpot.textContent = latency(r.tpot);
  weights.textContent = r.weightBytes ? bytes(r.weightBytes) : DASH;
  kv.replaceChildren(String(r.kvPages), r.kvIdle ? el("small", {}, ` (${r.kvIdle} idle)`) : "");
  device.textContent = percent(poolHistory.deviceShare(r.name));
  return node;
}

function showAttainment(cell, r) {
  const a = r.hasSlo ? poolHistory.attainment(r) : null;
  const label = cell.firstChild;
  label.textContent = r.known && !r.hasSlo ? "no slo" : a ? percent(a.share) : DASH;
  label.className = !a ? "old" : !a.recent ? "old" : a.share < 0.9 ? "missed" : a.share < 0.99 ? "near" : "";
  label.title = a ? (a.recent ? "tokens on time, last minute" : "tokens on time since the start; none in the last minute") : "";
  cell.lastChild.toggleAttribute("hidden", !r.hasSlo);
  spark(cell.lastChild, poolHistory.series(r.name, "share"), 1);
}
