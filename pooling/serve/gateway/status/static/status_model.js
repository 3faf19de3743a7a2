// From answers of the server to what is shown: no DOM here, so that every number can be checked alone.
"use strict";

const HISTORY = 300;
const RECENT_S = 60;
const PALETTE = [208, 28, 152, 274, 350, 88, 186, 322, 52, 236];

/** Devices of a state as [name, host state]; a pool of one host has no `hosts`. */
function hostsOf(state) {
  const hosts = state.hosts;
  if (Array.isArray(hosts)) return hosts.map((h, i) => [String(h.name ?? h.host ?? i), h.state ?? h]).filter(usable);
  if (hosts && typeof hosts === "object") return Object.entries(hosts).map(([k, h]) => [k, h?.state ?? h]).filter(usable);
  return [["device 0", state.host]].filter(usable);
}
const usable = ([, host]) => Boolean(host && host.num_pages);

/** Hosts that gave an error instead of their state, as [name, error]; Ray's head, too, while it is away. */
function failuresOf(state) {
  const all = state.hosts ? Object.entries(state.hosts) : [["The engine host", state.host]];
  const head = state.cluster?.head;
  const away = head && !head.up ? [["Ray's head", `for ${seconds(head.away_s)}; requests go on`]] : [];
  return [...all.filter(([, host]) => host?.error).map(([name, host]) => [name, host.error]), ...away];
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

/** Hue of a model by its place in the pool: fixed ones first, then by the golden angle. */
const hueOf = (index) => PALETTE[index] ?? Math.round((index * 137.508) % 360);

/** What a host's pages hold: weights, KV in use and idle of each model, null blocks, free. */
function memoryOf(host) {
  const { weights = {}, kv = {}, null: nulls = {} } = host.held_pages ?? {};
  const names = [...new Set([...Object.keys(host.models ?? {}), ...Object.keys(weights), ...Object.keys(kv)])];
  const models = names.map((model) => {
    const idle = Math.min(kv[model] ?? 0, host.models?.[model]?.kv_idle_pages ?? 0);
    return { model, weights: weights[model] ?? 0, kv: (kv[model] ?? 0) - idle, idle };
  });
  return { models, null: sum(Object.values(nulls)), free: host.num_free_pages ?? 0, total: host.num_pages };
}

/** Split `num` cells over segments by their pages; each segment with a page keeps a cell while there are enough. */
function cellsOf(memory, num) {
  const segments = [];
  for (const m of memory.models) {
    for (const use of ["weights", "kv", "idle"]) if (m[use]) segments.push({ model: m.model, use, pages: m[use] });
  }
  if (memory.null) segments.push({ model: null, use: "null", pages: memory.null });
  if (memory.free) segments.push({ model: null, use: "free", pages: memory.free });
  const total = sum(segments.map((s) => s.pages));
  if (!total) return [];
  const cells = Math.min(num, total);
  for (const s of segments) {
    s.exact = (s.pages / total) * cells;
    s.cells = Math.max(cells >= segments.length ? 1 : 0, Math.floor(s.exact));
  }
  let left = cells - sum(segments.map((s) => s.cells));
  while (left !== 0) {
    const step = Math.sign(left);
    const open = segments.filter((s) => step > 0 || s.cells > 1);
    open.sort((a, b) => step * (b.exact - b.cells - (a.exact - a.cells)));
    open[0].cells += step;
    left -= step;
  }
  return segments.filter((s) => s.cells);
}

/** One row per model of the pool, over all hosts that have it. */
function rowsOf(state) {
  const hosts = hostsOf(state);
  const loading = state.progress?.loading ?? {};
  const names = Object.keys(state.models ?? {});
  return names.map((name, index) => {
    const parts = hosts.map(([, host]) => host.models?.[name]).filter(Boolean);
    const total = (key) => sum(parts.map((p) => p[key] ?? 0));
    const worst = (key) => parts.map((p) => p[key]).filter(Boolean).sort((a, b) => b.p99 - a.p99)[0] ?? null;
    const pool = state.models[name];
    return {
      name, index, checkpoint: pool.model ?? "", pool: pool.state, inflight: pool.inflight ?? 0, reason: pool.reason ?? "",
      loading: loading[name] ?? null,
      weights: parts.map((p) => p.state), kvOut: parts.some((p) => p.kv === "out"),
      hasTurn: hosts.some(([, host]) => host.current_model === name),
      known: parts.length > 0, hasSlo: parts.some((p) => p.has_slo),
      running: total("running"), waiting: total("waiting"), goodput: total("goodput_tokens_per_s"),
      tokens: total("tokens"), onTime: total("tokens_on_time"), stepS: total("step_seconds"),
      ttft: worst("ttft_s"), tpot: worst("tpot_s"),
      weightBytes: Math.max(0, ...parts.map((p) => p.weight_bytes ?? 0)),
      kvPages: total("kv_pages"), kvIdle: total("kv_idle_pages"),
    };
  });
}

/** Word, tone and detail of a model's state. */
function stateOf(row) {
  if (row.loading) {
    const waits = row.loading.phase === "waiting";
    return { word: waits ? "waits to load" : row.loading.phase, tone: waits ? "open" : "warn", detail: waits ? "" : seconds(row.loading.elapsed_s) };
  }
  if (row.pool === "draining") return { word: "draining", tone: "warn", detail: `${row.inflight} left` };
  if (row.pool === "cold") return { word: "cold", tone: "open", detail: "" };
  if (row.pool !== "ready") return { word: row.pool, tone: row.pool === "loading" ? "warn" : "bad", detail: row.reason };
  const kinds = [...new Set(row.weights)];
  const word = kinds.length > 1 ? kinds.map((k) => `${row.weights.filter((w) => w === k).length} ${k}`).join(", ") : kinds[0] ?? "ready";
  const tone = kinds.includes("on device") ? "good" : kinds.some((k) => k === "copying" || k === "reading") ? "warn" : "open";
  return { word, tone, detail: row.kvOut ? "KV out" : "" };
}

/** Keeps per-model samples, so that rates and sparklines need nothing from the server but its totals. */
class History {
  constructor() { this.samples = new Map(); this.pools = []; }

  add(timeS, rows, hosts) {
    const total = (read) => sum(hosts.map(([, h]) => read(h) ?? 0));
    const previous = this.pools.at(-1);
    if (previous && timeS <= previous.t) return;
    const pool = {
      t: timeS, switches: total((h) => h.switches), waited: total((h) => h.residency?.switches),
      waitS: total((h) => h.residency?.visible_seconds), stepS: sum(rows.map((r) => r.stepS)), devices: hosts.length,
    };
    if (previous && pool.switches < previous.switches) { this.pools = []; this.samples.clear(); } // a new host
    this.pools = [...this.pools, pool].slice(-HISTORY);
    for (const row of rows) {
      const kept = this.samples.get(row.name) ?? [];
      const last = kept.at(-1);
      const fresh = last && row.tokens < last.tokens ? [] : kept;
      const before = fresh.at(-1);
      const tokens = before ? row.tokens - before.tokens : 0;
      fresh.push({
        t: timeS, tokens: row.tokens, onTime: row.onTime, stepS: row.stepS, goodput: row.goodput,
        share: tokens > 0 ? (row.onTime - before.onTime) / tokens : null,
      });
      this.samples.set(row.name, fresh.slice(-HISTORY));
    }
    for (const name of this.samples.keys()) if (!rows.some((r) => r.name === name)) this.samples.delete(name);
  }

  /** Share of tokens on time in the last minute; of all since the start if none came; null without tokens. */
  attainment(row) {
    const kept = this.samples.get(row.name) ?? [];
    const first = kept.find((s) => s.t >= (kept.at(-1)?.t ?? 0) - RECENT_S);
    const tokens = first ? row.tokens - first.tokens : 0;
    if (tokens > 0) return { share: (row.onTime - first.onTime) / tokens, tokens, recent: true };
    return row.tokens ? { share: row.onTime / row.tokens, tokens: row.tokens, recent: false } : null;
  }

  /** Shares of the device time of a model between the last two samples. */
  deviceShare(name) {
    const [a, b] = (this.samples.get(name) ?? []).slice(-2);
    return a && b ? (b.stepS - a.stepS) / (b.t - a.t) : null;
  }

  /** Switches per second, share of them waited for, shares of device time busy and waiting; null at first. */
  rates() {
    const [a, b] = this.pools.slice(-2);
    if (!a || !b) return null;
    const t = b.t - a.t, switches = b.switches - a.switches;
    return {
      switchesPerS: switches / t, waitedShare: switches ? Math.min(1, (b.waited - a.waited) / switches) : 0,
      waitShare: (b.waitS - a.waitS) / t / b.devices, busyShare: Math.min(1, (b.stepS - a.stepS) / t / b.devices),
    };
  }

  series(name, key) { return (this.samples.get(name) ?? []).map((s) => s[key]); }
}

/** The spans of the last seconds, of all devices, from answers that overlap. */
class Trace {
  constructor() { this.spans = new Map(); this.names = new Map(); }

  add(chrome) {
    for (const e of chrome?.traceEvents ?? []) {
      if (e.ph === "M" && e.name === "process_name") this.names.set(e.pid, e.args?.name ?? `device ${e.pid}`);
      if (e.ph !== "X") continue;
      const model = e.args?.model ?? "";
      this.spans.set(`${e.pid}/${e.ts}/${e.name}/${model}`, { device: e.pid, kind: e.name, model, start: e.ts / 1e6, end: (e.ts + e.dur) / 1e6 });
    }
  }

  /** Drop what ended before `since` and give the rest by device. */
  since(since) {
    const devices = new Map();
    for (const [key, span] of this.spans) {
      if (span.end < since) { this.spans.delete(key); continue; }
      if (!devices.has(span.device)) devices.set(span.device, []);
      devices.get(span.device).push(span);
    }
    return devices;
  }
}

/** For each of `num` columns of [from, to], the share of its time that each model's spans of a kind cover. */
function coverage(spans, kinds, from, to, num) {
  const models = new Map(), width = (to - from) / num;
  for (const s of spans) {
    if (!kinds.includes(s.kind) || s.end < from || s.start > to) continue;
    if (!models.has(s.model)) models.set(s.model, new Float64Array(num));
    const shares = models.get(s.model);
    const first = Math.max(0, Math.floor((s.start - from) / width)), last = Math.min(num - 1, Math.floor((s.end - from) / width));
    for (let i = first; i <= last; i++) {
      const left = from + i * width;
      shares[i] += Math.max(0, Math.min(s.end, left + width) - Math.max(s.start, left)) / width;
    }
  }
  return models;
}

// -- words ------------------------------------------------------------------------------------------------

const DASH = "\u2013";
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return `${n >= 100 || i === 0 ? Math.round(n) : n.toFixed(1)} ${units[i]}`;
}
function seconds(s) {
  if (s == null) return DASH;
  if (s < 0.0995) return `${(s * 1000).toFixed(s < 0.00995 ? 1 : 0)} ms`;
  if (s < 9.95) return `${s.toFixed(2)} s`;
  if (s < 120) return `${s.toFixed(0)} s`;
  return s < 7200 ? `${Math.floor(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} d`;
}
const percent = (share) => (share == null ? DASH : share > 0.9995 ? "100 %" : `${(share * 100).toFixed(share > 0.00995 || share === 0 ? 1 : 2)} %`);
const rate = (n) => (n == null ? DASH : n >= 99.5 ? String(Math.round(n)) : n.toFixed(1));
