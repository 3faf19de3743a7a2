# SPDX-License-Identifier: Apache-2.0
"""Which kinds of model a pool serves exactly: plain vLLM and a pool that is short of memory, for each kind.

    python -m tests.models.run [--kinds a,b] [--seconds 900] [--again] [--features] [--fixed]

Makes a tiny checkpoint with random weights of each kind, runs requests in plain vLLM and in a pool where weights and KV
come and go, and compares tokens and logprobs. What ran is kept, kind by kind: a run goes on where one was stopped.
Writes bench/results/models_cpu.json and docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.helpers.cases import mixed
from tests.helpers.plain import Case, run_program
from tests.models import features, page
from tests.models.forks import ROOT, run_pieces
from tests.models.kind import Kind
from tests.models.quantised import QUANTISED
from tests.models.table import KINDS
from tests.models.verdict import compare, distinct_tokens

FOLDER = ROOT / "build" / "models"
NUM_REQUESTS, NUM_TOKENS, NUM_TEXTS = 4, 40, 8
BATCH, GROUP = 16, 6
PLAIN_LIMIT_S, POOL_LIMIT_S = 90.0, 240.0
SMALL_PAGE = 256 << 10

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tried:
    """A kind that runs in plain vLLM."""

    case: Case
    facts: Answer
    results: Answer

    @property
    def page(self) -> int:
        """Smallest page that holds a block, wherever in a row of them it begins."""
        page_size, block = SMALL_PAGE, self.facts["block_bytes"]
        while block and page_size % block and page_size < 2 * block:
            page_size *= 2
        return page_size

    def pages(self, page_size: int) -> int:
        """Pages of its weights."""
        return -(-self.facts["weight_bytes"] // page_size)

    def pages_to_serve(self, page_size: int) -> int:
        """Pages of its weights and of the KV of one request, of which a page may hold no part of a block."""
        block = self.facts["block_bytes"]
        if not block:
            return self.pages(page_size) + 1
        whole, rest = divmod(page_size, block)
        in_a_page = whole if rest == 0 else max(1, (page_size - block + 1) // block)
        return self.pages(page_size) + -(-self.facts["request_bytes"] // block // in_a_page) + 1


def make_all(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Make the checkpoints in a process of its own; returns what went wrong, by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "make.log"
    code = run_program(["tests.models.make", str(folder), *names], log_file)
    said = log_file.read_text()
    assert code == 0, said[-4000:]
    failed: dict[str, str] = json.loads(said.splitlines()[-1])
    return failed


def case_of(name: str, kind: Kind, folder: Path) -> Case:
    """The requests of a kind: greedy and sampled ones in turns, some with the same beginning."""
    count = NUM_REQUESTS if kind.task is None else NUM_TEXTS
    made = mixed(count, NUM_TOKENS)(name, list(KINDS).index(name), None)
    if kind.task is not None:
        made = [replace(r, task=kind.task, temperature=0.0, seed=None) for r in made]
    if kind.media is not None:
        made = [replace(r, media=(kind.media, i)) for i, r in enumerate(made)]
    return Case(name, str(folder / name), {"max_model_len": 512, **kind.args}, made)


def run_plain(cases: Iterable[Case], folder: Path, *, how: str = "batch", movable: bool = True) -> dict[str, Answer]:
    """Each case in plain vLLM, its requests at once; or `alone`, one after the other, none from a prefix cache; or
    `staggered`, each some steps after the one before.

    Its linear layers have the kernels of weights that are `movable`.
    """
    common = {"how": how, "plain_gemm": movable}
    pieces = [{"name": case.name, "case": _fields(case, how == "alone"), **common} for case in cases]
    return run_pieces("tests.models.plain_side", pieces, folder, PLAIN_LIMIT_S, pooled=False)


def run_pools(
    groups: Sequence[Sequence[Tried]], folder: Path, *, alone: bool = False, movable: bool = True
) -> list[Answer]:
    """Each group in a pool of its own; one with fixed weights has memory for them all.

    What models have on the device beside weights, KV and media is not known before: a group that lacks pages for it
    gets them, and runs again.
    """
    pieces = _pieces(groups, alone=alone, movable=movable)
    answers = list(run_pieces("tests.models.pool_side", pieces, folder, POOL_LIMIT_S, pooled=True).values())
    lacking = {index: missing for index, answer in enumerate(answers) if (missing := _missing_pages(answer))}
    for index, missing in lacking.items():
        pieces[index]["pages"] += missing
    if lacking:
        again = [pieces[index] for index in lacking]
        more = run_pieces("tests.models.pool_side", again, folder / "wider", POOL_LIMIT_S, pooled=True).values()
        for index, answer in zip(lacking, more, strict=True):
            answers[index] = answer
    return answers


def _missing_pages(answer: Answer) -> int:
    told = (re.match(r"(\d+) more pages? (?:is|are) needed", why) for why in answer.get("refused", {}).values())
    return sum(int(found[1]) for found in told if found)


def _pieces(groups: Sequence[Sequence[Tried]], *, alone: bool, movable: bool) -> list[Answer]:
    pieces: list[Answer] = []
    for index, group in enumerate(groups):
        page_size = max(tried.page for tried in group)
        pages = max(tried.pages_to_serve(page_size) for tried in group) + 1
        pages += sum(tried.facts["block_bytes"] > 0 for tried in group)  # for a null block each
        pages += sum(-(-tried.facts["encoder_bytes"] // page_size) for tried in group)  # booked for each at any time
        if not movable:
            pages += 2 * sum(tried.pages(page_size) for tried in group)
        pieces.append(
            {
                "name": f"group-{index}",
                "cases": [_fields(tried.case, alone) for tried in group],
                "page": page_size,
                "pages": pages,
                "seed": index,
                "alone": alone,
                "movable": movable,
            }
        )
    return pieces


def _fields(case: Case, alone: bool) -> Answer:
    args = case.engine_args | ({"enable_prefix_caching": False} if alone else {})
    return asdict(replace(case, engine_args=args))


def groups_of(tried: Iterable[Tried]) -> list[list[Tried]]:
    """Groups of kinds whose weights are about as large, so that none alone makes the memory wide for the others."""
    ordered = sorted(tried, key=lambda t: (t.page, t.pages(t.page)))
    groups: list[list[Tried]] = []
    for one in ordered:
        last = groups[-1] if groups else []
        if (
            last
            and len(last) < GROUP
            and last[0].page == one.page
            and one.pages(one.page) <= 2 * last[0].pages(one.page)
        ):
            last.append(one)
        else:
            groups.append([one])
    return groups


def try_kinds(names: Sequence[str], folder: Path) -> dict[str, Answer]:
    """Make, run and compare some kinds; returns the entry of each."""
    failed = make_all(names, folder / "checkpoints")
    entries: dict[str, Answer] = {name: {"made": name not in failed} for name in names}
    for name, problem in failed.items():
        entries[name]["why"] = problem
    cases = {name: case_of(name, KINDS[name], folder / "checkpoints") for name in names if name not in failed}
    answers = run_plain(cases.values(), folder / "plain")
    tried = {}
    for name, answer in answers.items():
        if "error" not in answer:
            tried[name] = Tried(cases[name], answer["facts"], answer["results"])
        entries[name] |= _plain_entry(answer)
    groups = [g if len(g) > 1 else [*g, *_twins(g[0])] for g in groups_of(tried.values())]
    _pool(entries, groups, folder)
    _alone(entries, tried, folder)
    return entries


def _twins(one: Tried) -> list[Tried]:
    """Two more of a kind, that it has to share a device with."""
    return [replace(one, case=replace(one.case, name=f"{one.case.name}-{number}")) for number in (2, 3)]


def _plain_entry(answer: Answer) -> Answer:
    if "error" in answer:
        return {"plain": False, "why": answer["error"]}
    return {"plain": True, **answer["facts"], "distinct": distinct_tokens(answer["results"])}


def _pool(entries: dict[str, Answer], groups: list[list[Tried]], folder: Path) -> None:
    """Run the groups, and alone who was refused in one or was in one that failed; note what came of it."""
    again: list[list[Tried]] = []
    for group, answer in zip(groups, run_pools(groups, folder / "pools"), strict=True):
        refused = group if "error" in answer else [one for one in group if one.case.name in answer["refused"]]
        if refused and group[1].case.name in entries:
            again += [[one, *_twins(one)] for one in refused]
        _note(entries, group, answer)
    if again:
        for group, answer in zip(again, run_pools(again, folder / "singles"), strict=True):
            _note(entries, group[:1], answer)


def _note(entries: dict[str, Answer], group: list[Tried], answer: Answer) -> None:
    for one in group:
        name = one.case.name
        if name not in entries:
            continue
        if "error" in answer or name in answer["refused"]:
            entries[name] |= {"pooled": False, "why": answer.get("error") or answer["refused"][name]}
            continue
        model = answer["models"][name]
        verdict = compare(one.results, model.pop("results"))
        entries[name] |= {"pooled": True, **model, **asdict(verdict), "same": verdict.same}
        entries[name] |= {"switches": answer["switches"], "alone": False}


def _alone(entries: dict[str, Answer], tried: dict[str, Tried], folder: Path) -> None:
    """Compare those that differ request by request: a pool has other batches, and some kinds depend on them."""
    differ = [one for name, one in tried.items() if name in entries and entries[name].get("same") is False]
    if not differ:
        return
    cases = [one.case for one in differ]
    answers = run_plain(cases, folder / "plain-alone", how="alone")
    staggered = run_plain(cases, folder / "plain-staggered", how="staggered")
    ran = [(one, answers[one.case.name]) for one in differ if "error" not in answers[one.case.name]]
    groups = [[replace(one, results=a["results"]), *_twins(one)] for one, a in ran]
    pools = run_pools(groups, folder / "pools-alone", alone=True)
    for (one, answer), (single, *_), pool in zip(ran, groups, pools, strict=True):
        own = compare(one.results, answer["results"])
        later = compare(one.results, staggered[one.case.name].get("results", {}))
        noise = {
            "plain_alone": own.equal + own.close,
            "plain_staggered": later.equal + later.close,
            "plain_noise": max(own.largest, later.largest),
            "in_batch": entries[one.case.name]["equal"],
        }
        if own.equal == own.total == later.equal:
            continue  # plain vLLM gives the same however requests meet: the difference is the pool's
        _note(entries, [single], pool)
        entries[one.case.name] |= {**noise, "alone": True}


def try_features(entries: dict[str, Answer], folder: Path) -> None:
    """Try variants of kinds that are equal; note in the entries what came of them."""
    wanted: dict[str, tuple[str, str]] = {}
    cases: list[Case] = []
    for name, entry in entries.items():
        entry["with"] = {}
        base = case_of(name, KINDS[name], folder / "checkpoints")
        for feature, case in features.variants(name, KINDS[name], entry, base, folder / "checkpoints").items():
            wanted[case.name] = name, feature
            cases.append(case)
    answers = run_plain(cases, folder / "plain")
    made: dict[str, Answer] = {name: _plain_entry(answer) for name, answer in answers.items()}
    tried = [Tried(case, answers[case.name]["facts"], answers[case.name]["results"])
             for case in cases if made[case.name]["plain"]]  # fmt: skip
    if tried:
        _pool(made, [g if len(g) > 1 else [*g, *_twins(g[0])] for g in groups_of(tried)], folder)
    for variant, (name, feature) in wanted.items():
        kept = ("plain", "pooled", "same", "equal", "total", "largest", "why")
        entries[name]["with"][feature] = {key: made[variant][key] for key in kept if key in made[variant]}


def try_fixed(names: Sequence[str], folder: Path) -> dict[str, Answer]:
    """Kinds in a pool whose weights stay: equal to plain vLLM with its own kernels, which pack weights anew."""
    cases = [case_of(name, KINDS[name], folder / "checkpoints") for name in names]
    answers = run_plain(cases, folder / "plain-fixed", movable=False)
    ran = [
        Tried(c, answers[c.name]["facts"], answers[c.name]["results"]) for c in cases if "error" not in answers[c.name]
    ]
    entries: dict[str, Answer] = {one.case.name: {} for one in ran}
    groups = groups_of(ran)
    for group, answer in zip(groups, run_pools(groups, folder / "pools-fixed", movable=False), strict=True):
        _note(entries, group, answer)
    kept = ("pooled", "same", "equal", "total", "largest", "why")
    return {name: {key: entry[key] for key in kept if key in entry} for name, entry in entries.items()}


def main() -> None:
    """Read the flags, run what is left to run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", help="names, with commas between them (default: all)")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after this time")
    parser.add_argument("--features", action="store_true", help="try adapters and n-grams with what is equal too")
    parser.add_argument("--fixed", action="store_true", help="try quantised kinds with weights that stay too")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for checkpoints, logs and results")
    args = parser.parse_args()
    names = args.kinds.split(",") if args.kinds else list(KINDS)
    if unknown := set(names) - set(KINDS):
        parser.error(f"no kind {', '.join(sorted(unknown))}")
    begun_s = time.monotonic()
    kept = args.folder / "entries"
    kept.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if args.again or not _is_kept(kept, name)]
    left.sort(key=lambda name: (kept / f"{name}.json").exists())  # first what has not run at all
    while left and time.monotonic() - begun_s < args.seconds:
        now, left = left[:BATCH], left[BATCH:]
        for name, entry in try_kinds(now, args.folder).items():
            (kept / f"{name}.json").write_text(json.dumps(entry | {"fields": repr(KINDS[name])}))
            print(f"{name}: {_in_a_word(entry)}", flush=True)
    if args.features:
        _run_features([name for name in names if _is_kept(kept, name)], kept, args, begun_s + args.seconds)
    if args.fixed:
        chosen = [name for name in names if KINDS[name] in QUANTISED.values() and _is_kept(kept, name)]
        for name, fixed in try_fixed([n for n in chosen if _kept(kept, n).get("pooled")], args.folder).items():
            (kept / f"{name}.json").write_text(json.dumps(_kept(kept, name) | {"fixed": fixed}))
            print(f"{name} fixed: {json.dumps(fixed)}", flush=True)
    entries = {name: json.loads((kept / f"{name}.json").read_text()) for name in names if _is_kept(kept, name)}
    for entry in entries.values():
        del entry["fields"]
    page.write(entries)
    if left:
        print(f"not run yet: {', '.join(left)}")
    print(page.summary(entries))


def _run_features(names: Sequence[str], kept: Path, args: argparse.Namespace, end_s: float) -> None:
    entries = {name: json.loads((kept / f"{name}.json").read_text()) for name in names}
    left = [name for name in names if entries[name].get("pooled") and (args.again or "with" not in entries[name])]
    while left and time.monotonic() < end_s:
        now, left = left[:BATCH], left[BATCH:]
        chosen = {name: entries[name] for name in now}
        try_features(chosen, args.folder)
        for name, entry in chosen.items():
            (kept / f"{name}.json").write_text(json.dumps(entry))
            print(f"{name}: {json.dumps(entry['with'])}", flush=True)
    if left:
        print(f"features not tried yet: {', '.join(left)}")


def _kept(folder: Path, name: str) -> Answer:
    entry: Answer = json.loads((folder / f"{name}.json").read_text())
    return entry


def _is_kept(folder: Path, name: str) -> bool:
    """Whether a kind has run as it is in the table; where nothing left the device, that proves nothing."""
    file = folder / f"{name}.json"
    if not file.exists():
        return False
    entry = json.loads(file.read_text())
    return entry["fields"] == repr(KINDS[name]) and entry.get("weight_evictions") != 0


def _in_a_word(entry: Answer) -> str:
    if entry.get("pooled"):
        how = " one by one" if entry["alone"] else ""
        evicted = f"{entry['weight_evictions']} and {entry['kv_evictions']} evictions"
        return (
            f"{entry['equal']}+{entry['close']} of {entry['total']} equal{how}, {evicted}, {entry['distinct']} tokens"
        )
    return f"{'plain only' if entry.get('plain') else 'not in plain vLLM'}: {entry.get('why')}"


if __name__ == "__main__":
    main()
