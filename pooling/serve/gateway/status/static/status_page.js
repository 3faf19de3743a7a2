// The page: asks for the key, polls the server, shows what it says.
"use strict";

const KEY = "tokenpool-admin-key", THEME = "tokenpool-theme";
const LIMIT_MS = 15000, RETRY_MS = 3000, DECISIONS_EVERY = 3;
const poolHistory = new History(), trace = new Trace();
const view = { state: null, at: 0, skewS: 0, traceAt: 0, polls: 0, hasDecisions: true, lit: null, sort: "index", down: false };
let timer = 0, generation = 0;

// -- the server -------------------------------------------------------------------------------------------

class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

const base = location.pathname.replace(/\/pool\/?$/, "");

async function ask(path) {
  const stop = AbortSignal.timeout(LIMIT_MS);
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` };
  const answer = await fetch(base + path, { headers, signal: stop, cache: "no-store", credentials: "omit" });
  const body = await answer.json().catch(() => null);
  if (answer.ok) return body;
  throw new Refusal(answer.status, body?.error?.message ?? `the server answers ${answer.status}`);
}

async function poll() {
  clearTimeout(timer);
  const mine = ++generation;
  let wait = Number($("interval").value);
  try {
    const state = await ask("/v1/pool/state");
    if (mine !== generation) return;
    take(state);
    await Promise.all([pollTrace(), pollDecisions()]);
    if (mine !== generation) return;
    connected();
  } catch (error) {
    if (mine !== generation) return;
    if (error instanceof Refusal && [401, 403].includes(error.status)) return login(error);
    disconnected(error);
    wait = RETRY_MS;
  }
  show();
  if (!document.hidden && (wait || view.down)) timer = setTimeout(poll, wait || RETRY_MS);
}

async function pollTrace() {
  const now = performance.now();
  const last = view.traceAt ? Math.min(60, (now - view.traceAt) / 1000 + 1) : Number($("window").value);
  try {
    trace.add(await ask(`/v1/pool/trace?seconds=${last.toFixed(1)}`));
    view.traceAt = now;
  } catch (error) {
    if (error instanceof Refusal && error.status < 500) throw error;
    if (!(error instanceof Refusal) && error.name !== "TimeoutError") throw error; // a busy host has no trace now
  }
}

async function pollDecisions() {
  if (!view.hasDecisions || view.polls++ % DECISIONS_EVERY) return;
  try {
    const answer = await ask("/v1/pool/decisions");
    showDecisions(Array.isArray(answer) ? answer : answer?.decisions ?? []);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 404) view.hasDecisions = false;
  }
}

function take(state) {
  view.state = state;
  view.at = performance.now();
  const hosts = hostsOf(state);
  const fresh = hosts.filter(([, h]) => !h.age_s);
  if (fresh.length) {
    const timeS = fresh[0][1].time_s ?? Date.now() / 1000;
    view.skewS = timeS - performance.now() / 1000;
    poolHistory.add(timeS, rowsOf(state), hosts);
  }
}

// -- connection -------------------------------------------------------------------------------------------

function link(tone, text) {
  $("link").firstChild.className = `dot ${tone}`;
  if ($("link-text").textContent !== text) $("link-text").textContent = text;
}

function login(error) {
  sessionStorage.removeItem(KEY);
  $("board").hidden = $("banner").hidden = $("forget").hidden = true;
  $("login").hidden = false;
  $("login-error").textContent = error ? error.message : "";
  link(error ? "bad" : "", error?.status === 403 ? "admin API is off" : "no key");
  $("key").focus();
}

function connected() {
  view.down = false;
  const { state } = view;
  $("board").classList.remove("stale");
  if (state.stopping) link("warn", "draining: the server is stopping");
  else if (state.progress) link("warn", `loading ${state.progress.done} of ${state.progress.total}`);
  else link(state.ready ? "good" : "bad", state.ready ? "ready" : "not ready");
  const silent = failuresOf(state).map(([name, error]) => `${name} does not answer: ${error}`);
  const failed = Object.entries(state.models ?? {}).filter(([, model]) => model.state === "failed");
  banner([...silent, ...failed.map(([name, model]) => `${name} failed: ${model.reason}`)].join(". "), "bad");
}

function disconnected(error) {
  view.down = true;
  const reason = error instanceof Refusal ? error.message : error.name === "TimeoutError" ? "no answer in time" : "the server cannot be reached";
  link("bad", "disconnected");
  const age = view.at ? ` What is shown is ${seconds((performance.now() - view.at) / 1000)} old.` : "";
  banner(`Disconnected: ${reason}. Trying again every ${RETRY_MS / 1000} s.${age}`, "bad");
  $("board").classList.add("stale");
}

function banner(text, tone = "") {
  const node = $("banner");
  node.hidden = !text;
  node.className = `banner ${tone}`;
  if (node.textContent !== text) node.textContent = text;
}

// -- sections ---------------------------------------------------------------------------------------------

function show() {
  const { state } = view;
  if (!state) return;
  $("board").hidden = false;
  $("login").hidden = true;
  $("forget").hidden = false;
  const hosts = hostsOf(state), rows = rowsOf(state);
  const age = Math.max(0, ...hosts.map(([, h]) => h.age_s ?? 0));
  const parts = [hosts[0]?.[1].policy, hosts.length ? `up ${seconds(Math.min(...hosts.map(([, h]) => h.uptime_s ?? 0)))}` : "no device yet"];
  if (hosts.length > 1) parts.push(`${hosts.length} devices`);
  if (state.host_restarts) parts.push(`${state.host_restarts} host restarts`);
  if (age > 1) parts.push(`device figures ${seconds(age)} old: the host is building a model`);
  $("about").textContent = parts.filter(Boolean).join(" \u00b7 ");
  showProgress(state.progress);
  showFigures(hosts, rows);
  showMemory(hosts, rows);
  showTurns(rows);
  showModels(rows);
}

function showProgress(progress) {
  const node = $("progress");
  node.hidden = !progress;
  if (!progress) return;
  const { done, total } = progress;
  const items = Object.entries(progress.loading).map(([name, p]) =>
    el("li", {}, el("span", {}, name), el("span", {}, p.phase === "waiting" ? "waiting" : `${p.phase}, ${seconds(p.elapsed_s)}`)));
  node.replaceChildren(
    el("h2", {}, `Loading models: ${done} of ${total} ready`),
    el("progress", { max: total, value: done, "aria-label": "models ready" }), el("ul", {}, ...items));
}

function showFigures(hosts, rows) {
  const rates = poolHistory.rates();
  const withSlo = rows.filter((r) => r.hasSlo);
  const recent = withSlo.map((r) => poolHistory.attainment(r)).filter((a) => a?.recent);
  const attainment = recent.length ? sum(recent.map((a) => a.share * a.tokens)) / sum(recent.map((a) => a.tokens)) : null;
  const pages = hosts.map(([, h]) => h), all = sum(pages.map((h) => h.num_pages * h.page_size));
  const free = sum(pages.map((h) => h.num_free_pages * h.page_size));
  const budget = sum(pages.map((h) => h.host_memory?.budget_bytes ?? 0)), left = sum(pages.map((h) => h.host_memory?.free_bytes ?? 0));
  const used = (part, whole) => (whole ? 1 - part / whole : null);
  figures([
    ["Models ready", rows.filter((r) => r.pool === "ready").length, `of ${rows.length}`],
    ["Goodput", rate(sum(rows.map((r) => r.goodput))), "tok/s", "on time, last 10 s"],
    ["On time", percent(attainment), "", withSlo.length || !rows.some((r) => r.known) ? "of tokens, last minute" : "no model has an slo"],
    ["Requests", sum(rows.map((r) => r.running)), "running", `${sum(rows.map((r) => r.waiting))} waiting`],
    ["Device time", rates ? percent(rates.busyShare) : DASH, "in steps", rates ? `${percent(rates.waitShare)} waiting for switches` : ""],
    ["Switches", rates ? rate(rates.switchesPerS) : DASH, "/s", rates ? `${percent(rates.waitedShare)} waited for` : ""],
    ["Device memory", percent(used(free, all)), "", `of ${bytes(all)}`, used(free, all)],
    ["Host memory", percent(used(left, budget)), "", `of ${bytes(budget)}`, used(left, budget)],
  ]);
}

function figures(items) {
  const node = $("figures");
  node.replaceChildren(...items.map(([name, value, unit, note, meter]) => {
    const fill = el("i");
    if (meter != null) fill.style.width = `${meter * 100}%`;
    return el("div", {}, el("dt", {}, name), el("dd", {}, String(value), unit ? el("small", {}, ` ${unit}`) : null),
      note ? el("dd", { className: "sub" }, note) : null, meter == null ? null : el("div", { className: "meter" }, fill));
  }));
}

function indexer(rows) {
  const places = new Map(rows.map((r) => [r.name, r.index]));
  return (name) => places.get(name) ?? places.size;
}

function showMemory(hosts, rows) {
  const node = $("memory"), by = document.querySelector("input[name=colour]:checked").value, indexOf = indexer(rows);
  while (node.children.length > hosts.length) node.lastChild.remove();
  if (!hosts.length) { node.replaceChildren(el("p", { className: "empty" }, "No device yet: the engine host is starting.")); $("memory-legend").replaceChildren(); return; }
  if (node.firstChild?.className === "empty") node.replaceChildren();
  hosts.forEach(([name, host], i) => {
    const memory = memoryOf(host);
    const block = node.children[i] ?? node.appendChild(el("div", { className: "device" }, el("p"), el("canvas", { role: "img" }), el("p"), el("div", { className: "bar" })));
    const [title, canvas, hostTitle, bar] = block.children;
    const text = memorySummary(host, memory);
    title.textContent = hosts.length > 1 ? `${name}: ${text}` : text;
    canvas.setAttribute("aria-label", `Pages of ${name}: ${text}`);
    const at = drawMemory(canvas, memory, by, indexOf, view.lit);
    canvas.onmousemove = (event) => hover(event, at(event.offsetX, event.offsetY), host);
    canvas.onmouseleave = () => hover(null);
    showHostMemory(hostTitle, bar, host);
  });
  const legend = by === "use" ? [] : rows.filter((r) => r.weights.length).map((r) => chip(modelColour(r.index), r.name));
  const uses = by === "use" ? ["weights", "kv", "idle"].map((u) => chip(ink(USE_INK[u]), USE_NAME[u]))
    : [el("li", {}, "full colour weights, lighter KV in use, lightest KV idle")];
  uses.push(chip(ink("null"), "null blocks"), el("li", {}, el("i", { className: "chip free" }), "free"));
  $("memory-legend").replaceChildren(...uses, ...legend);
}

function memorySummary(host, memory) {
  const of = (key) => sum(memory.models.map((m) => m[key]));
  return `${memory.total} pages of ${bytes(host.page_size)}; ${of("weights")} weights, ${of("kv")} KV in use, ${of("idle")} KV idle, ${memory.free} free`;
}

function showHostMemory(title, bar, host) {
  const memory = host.host_memory ?? { budget_bytes: 0, held_bytes: {} };
  const held = (use) => sum(Object.values(memory.held_bytes?.[use] ?? {}));
  const parts = [["weights", "use-weights"], ["paused_kv", "use-paused"], ["cached_kv", "use-idle"]];
  title.textContent = `host memory ${bytes(memory.budget_bytes)}: ` + parts.map(([use]) => `${bytes(held(use))} ${use.replace("_kv", " KV")}`).join(", ");
  if (memory.node?.hosts) title.textContent += `; node ${bytes(memory.node.used_bytes)} of ${bytes(memory.node.budget_bytes)}, ${memory.node.hosts} hosts`;
  bar.replaceChildren(...parts.map(([use, colour]) => {
    const part = el("i", { title: use.replace("_", " ") });
    part.style.width = `${(held(use) / (memory.budget_bytes || 1)) * 100}%`;
    part.style.background = `var(--${colour})`;
    return part;
  }));
}

function chip(colour, text) {
  const mark = el("i", { className: "chip" });
  mark.style.background = colour;
  return el("li", {}, mark, text);
}

function hover(event, segment, host) {
  const tip = $("tip");
  tip.hidden = !segment;
  if (!segment) return;
  const pages = `${segment.pages} pages, ${bytes(segment.pages * host.page_size)}`;
  tip.textContent = segment.model ? `${segment.model}: ${USE_NAME[segment.use]}, ${pages}` : `${USE_NAME[segment.use]}: ${pages}`;
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${event.clientY + 14}px`;
}

function showTurns(rows) {
  const spanS = Number($("window").value), to = view.skewS + view.at / 1000, from = to - spanS;
  const devices = [...trace.since(to - 61)], node = $("turns"), indexOf = indexer(rows);
  const busy = devices.some(([, spans]) => spans.some((s) => s.end >= from));
  $("turns-legend").hidden = !busy;
  if (!busy) {
    node.replaceChildren(el("p", { className: "empty" }, `No model had the device in the last ${spanS} s.`));
    return;
  }
  if (node.firstChild?.className === "empty") node.replaceChildren();
  while (node.children.length > devices.length) node.lastChild.remove();
  devices.forEach(([device, spans], i) => {
    const block = node.children[i] ?? node.appendChild(el("div", { className: "device" }, el("p"), el("canvas", { role: "img" })));
    const shares = drawTurns(block.lastChild, spans, from, to, indexOf);
    const idle = Math.max(0, 1 - shares.busy - shares.waiting);
    const name = devices.length > 1 ? `${trace.names.get(device) ?? `device ${device}`}: ` : "";
    const text = `${name}turns ${percent(shares.busy)}, waiting for switches ${percent(shares.waiting)}, idle ${percent(idle)}`
      + (shares.rest ? `; ${shares.rest} more models had less` : "");
    block.firstChild.textContent = text;
    const top = shares.models.slice(0, 5).map(([n, s]) => `${n} ${percent(s)}`).join(", ");
    block.lastChild.setAttribute("aria-label", `Turns of the last ${spanS} s. ${text}. Most: ${top}`);
  });
  $("turns-legend").replaceChildren(
    el("li", {}, "colour: the model that had the device"), chip(ink("wait"), "waiting for a switch"),
    chip(ink("copy-in"), "copied to the device or from disk"), chip(ink("copy-out"), "left the device"));
}

function showDecisions(list) {
  $("decisions-section").hidden = false;
  const items = list.slice(-200).reverse().map((d) => {
    const at = d.at_s ? new Date(d.at_s * 1000) : null;
    return el("li", {}, el("time", { dateTime: at?.toISOString() ?? "" }, at?.toLocaleTimeString() ?? ""), el("b", {}, d.action ?? ""),
      el("span", {}, [d.model, d.host].filter(Boolean).join(" on ")), el("span", {}, d.reason ?? ""));
  });
  $("decisions").replaceChildren(...(items.length ? items : [el("li", {}, "None yet.")]));
}

// -- start ------------------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = $("theme").value = theme;
  show();
}

function start() {
  buildTable();
  try { setTheme(localStorage.getItem(THEME) ?? "auto"); } catch { setTheme("auto"); }
  $("theme").onchange = (event) => {
    try { localStorage.setItem(THEME, event.target.value); } catch { /* private mode: for this page only */ }
    setTheme(event.target.value);
  };
  $("interval").onchange = () => (view.state ? poll() : undefined);
  $("window").onchange = () => { view.traceAt = 0; poll(); };
  $("filter").oninput = $("sort").onchange = show;
  document.querySelectorAll("input[name=colour]").forEach((node) => { node.onchange = show; });
  $("forget").onclick = () => { clearTimeout(timer); generation++; login(); };
  $("login").onsubmit = (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    $("key").value = "";
    if (!/^[\x21-\x7e]+$/.test(key)) { $("login-error").textContent = "A key has only printable ASCII characters, without spaces."; return; }
    sessionStorage.setItem(KEY, key);
    link("", "connecting");
    poll();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  let resize = 0;
  addEventListener("resize", () => { cancelAnimationFrame(resize); resize = requestAnimationFrame(show); });
  document.addEventListener("visibilitychange", () => {
    if (!sessionStorage.getItem(KEY)) return;
    if (document.hidden) clearTimeout(timer); else poll();
  });
  if (sessionStorage.getItem(KEY)) poll(); else login();
}

start();
