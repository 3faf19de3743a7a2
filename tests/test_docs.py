# SPDX-License-Identifier: Apache-2.0
"""README and docs: generated files are current, links lead somewhere, examples are good, figures are measured ones."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.reference.__main__ import generated
from deploy.reference.keys import SECTIONS
from tokenpool.config import PoolConfig
from tokenpool.metric_registry import METRICS
from tokenpool.model_life import Life
from tokenpool.sections import keys_of

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md")), ROOT / "deploy/README.md", ROOT / "patches/README.md"]
CODE = [
    path
    for folder in ("pooling", "scheduler_plugins", "patches", "bench", "deploy", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".txt", ".sh", ".tpl")
]
RESULTS = ROOT / "bench/results"
MOST_LINES = 200


def test_each_state_of_a_models_life_is_told() -> None:
    """docs/routes.md has a row for each state of the table, and no other one."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", (DOCS / "routes.md").read_text(), re.MULTILINE)
    assert [*map(str, Life)] == [row for row in rows if row in {*map(str, Life)} | {"resident"}]


def prose(path: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head) for head in heads)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def dead(page: Path, link: str) -> bool:
    """Whether a relative link of a page names no file, or a heading that its page has not."""
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


def test_every_relative_link_leads_to_a_file_and_a_heading():
    """Of README, docs and the two other READMEs; images too."""
    found = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    links = [(page, link) for page, link in found if "://" not in link]
    assert len(links) > 100, "no links were read"
    assert [] == [f"{page.relative_to(ROOT)}: {link}" for page, link in links if dead(page, link)]


def test_every_page_that_the_code_names_exists():
    """Comments, messages and manifests lead to pages that are there, and to their headings."""
    named = [(path, name) for path in CODE for name in re.findall(r"\bdocs/\w+\.md(?:#[\w-]+)?", path.read_text())]
    assert named
    assert [] == [f"{path.relative_to(ROOT)}: {name}" for path, name in named if dead(README, name)]


def test_the_readme_leads_to_every_page():
    """No page of docs/ is out of reach from the README."""
    assert [] == [path.name for path in DOCS.glob("*.md") if f"](docs/{path.name})" not in README.read_text()]


def test_the_readme_is_short():
    """It is read in a few minutes; what is looked up stands in docs/."""
    assert len(README.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_every_generated_file_is_current(path):
    """`make reference` would change nothing: neither a page of docs/ nor the chart's schema."""
    assert generated()[path] == path.read_text(), "run make reference"


def test_the_metrics_page_has_every_metric():
    """Each registered metric stands in one table, and no other of ours does."""
    listed = re.findall(r"^\| `(tokenpool:\w+)` \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(metric.exported for metric in METRICS.values())


MODEL = {"name": "a", "model": "org/a"}


def written(section: str, key: str, value: Any) -> dict[str, Any]:
    """A pool file with one key given; `value` None leaves it out."""
    given = {} if value is None else {key: value}
    slo = {"ttft": "1s", "tpot": "1s"}
    return {
        "the pool": {"models": [MODEL], **given},
        "models": {"models": [MODEL | given]},
        "slo": {"models": [MODEL | {"slo": slo | given}]},
        "tenants": {"models": [MODEL], "tenants": [{"name": "t", "keys": "sha256:" + 64 * "0"} | given]},
    }.get(section, {"models": [MODEL], section: given})


def defaults() -> Iterator[tuple[str, str, str]]:
    """(section, key, default as the page says it) of every key with a default that can be written."""
    for section, cls in SECTIONS.items():
        yield from ((section, name, key.default_text) for name, key in keys_of(cls).items() if key.default_text)


def test_defaults_are_written_as_a_pool_file_takes_them():
    """A pool file that spells a default out is the one without it."""
    found = list(defaults())
    assert len(found) > 20
    without = {(s, k): PoolConfig.from_dict(written(s, k, None)) for s, k, _ in found}
    spelt = {(s, k): PoolConfig.from_dict(written(s, k, yaml.safe_load(text))) for s, k, text in found}
    assert without == spelt


@pytest.mark.parametrize("page", [README, DOCS / "configuration.md", DOCS / "usage.md"], ids=lambda page: page.name)
def test_pool_files_of_the_pages_are_good(page, tmp_path, monkeypatch):
    """Our own loader takes each, with folders where it names paths."""
    monkeypatch.setenv("POOL_API_KEY", "key-0123456789ab")
    monkeypatch.setenv("POOL_ADMIN_KEY", "key-ba9876543210")
    files = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert files
    for text in files:
        for name in re.findall(r"model: \./([\w/]+)", text):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        assert PoolConfig.from_dict(yaml.safe_load(text), str(tmp_path / "pool.yaml")).models


def test_the_first_pool_file_is_short():
    """The README's has eight lines."""
    (text,) = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(text.splitlines()) <= 8


def test_the_routes_page_has_every_route_of_the_pool():
    """Each method and path that the pool's own app answers stands in the table, and no other does."""
    tree = ast.parse((ROOT / "pooling/serve/gateway/endpoints.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    served = set()
    for call in (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Route"):
        given = [word.value for word in call.keywords if word.arg == "methods"]
        methods = [["GET"] if isinstance(value, ast.Name) else ast.literal_eval(value) for value in given]
        path = ast.literal_eval(call.args[0]).replace(":path", "")
        served |= {f"{method} {path}" for method in methods[0]}
    rows = re.findall(r"^\| (`[^|]+`) \|", (DOCS / "routes.md").read_text(), re.MULTILINE)
    assert served == {route for row in rows for route in re.findall(r"`([A-Z]+ /[^`]*)`", row)}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())["values"]


@pytest.mark.parametrize("page", [README, DOCS / "results.md"], ids=lambda page: page.name)
def test_every_result_file_that_is_named_exists(page):
    """A claim rests on a file that can be looked into."""
    names = set(re.findall(r"`(?:bench/results/)?(\w+\.json)`", page.read_text()))
    assert names and [] == sorted(name for name in names if not (RESULTS / name).exists())


def figures() -> Iterator[tuple[str, str]]:
    """(file, what the README's row that names the file says of it) of every figure of the table."""
    tax, noise = result("one_model_tax_cpu.json"), result("one_model_tax_noise_cpu.json")
    pool, plain = (", ".join(f"{arm[f'throughput_ratio_c{n}']:.2f}" for n in (1, 8, 32)) for arm in (tax, noise))
    worst = min(min(rounds) for rounds in tax["throughput_ratio_spread"].values())
    yield "one_model_tax_cpu.json", f"{pool}; plain vLLM against itself: {plain} | worst of 5 rounds: {worst:.2f}"
    many = result("many_models_8_cpu.json")
    saved = f"{many['rss_ratio']:.2f} of the memory, {many['throughput_ratio']:.2f} of the throughput"
    passes = {side: [run for run in many["passes"] if run["side"] == side] for side in ("pool", "separate")}
    held = {side: [run["memory_bytes"]["pss"] for run in runs] for side, runs in passes.items()}
    speed = {side: [run["tokens_per_s"] for run in runs] for side, runs in passes.items()}
    least = f"{max(held['pool']) / min(held['separate']):.2f}, {min(speed['pool']) / max(speed['separate']):.2f}"
    yield "many_models_8_cpu.json", f"{saved} | worst of 2 passes each: {least}"
    ratio = {size["mib"]: size["memcpy_ratio"] for size in result("switch_cpu.json")["sizes"]}
    yield "switch_cpu.json", f"{ratio[256]:.2f} | 16 MiB: {ratio[16]:.2f}; 1 MiB: {ratio[1]:.1f}"
    trace = result("serve_trace_cpu.json")
    order = sorted(trace["rate90"], key=trace["rate90"].get, reverse=True)
    yield "serve_trace_cpu.json", ", ".join(f"`{policy}` {trace['rate90'][policy]:.1f}" for policy in order)
    last = max((run for run in trace["runs"] if run["policy"] == "slack"), key=lambda run: run["rate"])
    tokens, requests = (f"{100 * last[f'{of}_attainment']:.0f} %" for of in ("token", "request"))
    missed = f"at {last['rate']:.0f} per second `slack` has {tokens} of tokens and {requests} of requests on time"
    yield "serve_trace_cpu.json", missed
    compared = result("sim_compare.json")
    strict, beyond = compared["strict"], compared["beyond"][0]
    yield "sim_compare.json", f"`slack` {strict['slack_r0.1']}, `aegaeon` at its best {strict['aegaeon_best_r0.1']} |"
    tokens, worst = (min(run[key] for run in beyond["by_seed"]) for key in ("token_deadline_pct", "worst_model_pct"))
    more = f"with {beyond['models']} models `slack` has {tokens:.0f} % on time, the worst model {worst:.0f} %; "
    at_half = f"`slack` {strict['slack_r0.5']}, `aegaeon` {strict['aegaeon_best_r0.5']}"
    yield "sim_compare.json", f"{more}at 0.5 requests/s: {at_half} |"
    chaos = result("chaos_cpu.json")
    assert [chaos[key] for key in ("lost", "wrong", "duplicated", "refused")] == [0] * 4
    asked = sum(run["asked"] for run in chaos["rounds"])
    yield "chaos_cpu.json", f"{chaos['refused']} of {asked:,} new requests at living servers not answered |"
    pause = max(run["pause_max_s"] for run in chaos["rounds"])
    yield "chaos_cpu.json", f"longest pause {pause:.1f} s ({chaos['undisturbed_pause_max_s']:.1f} s without a fault)"


def test_the_figures_of_the_readme_are_those_of_the_result_files():
    """Each row of the table of results says what its file holds, rounded; no figure outlives its measurement."""
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ") and ".json`" in line]
    wrong = [(name, text) for name, text in figures() if not any(f"`{name}`" in r and text in r for r in rows)]
    assert [] == wrong
    assert {name for name, _ in figures()} >= {row.rsplit("| `", 1)[1].partition("`")[0] for row in rows}


NAMED = re.compile(r"(?<![\w/.-])(?:tests|bench|pooling|patches|scheduler_plugins|deploy)/[\w./-]*\w")
"""Paths of files and folders in a text."""
CHECKS = set(re.findall(r"^ *check (\w+) ", (ROOT / "bench/gpu/first_minutes.sh").read_text(), re.MULTILINE))
NO_CHECK = re.compile(r"none\b|not (written|in the script)|tensor parallelism on GPUs is refused")


def rows_of(page: str, head: str) -> list[list[str]]:
    """The cells of a table, below the row of its heads that begins with this one."""
    lines = iter((DOCS / f"{page}.md").read_text().splitlines())
    assert any(line.startswith(f"| {head} |") for line in lines), f"{page}: no table of {head}"
    assert next(lines).startswith("|--")
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    assert rows and len({len(row) for row in rows}) == 1
    return rows


@pytest.mark.parametrize("page", ["gpu", "tensor_parallel"])
def test_every_file_that_the_pages_of_gpus_name_exists(page):
    """What proves a claim is there."""
    named = set(NAMED.findall((DOCS / f"{page}.md").read_text()))
    assert len(named) > 10
    assert [] == sorted(name for name in named if not (ROOT / name).exists())


def test_each_finding_has_a_proof_and_a_check():
    """A test that runs on the CPU, and a check of the script by its name, or that there is none."""
    rows = rows_of("gpu", "finding")
    assert len(rows) > 30
    for finding, mended, proof, check in rows:
        assert mended, finding
        assert re.search(r"tests/[\w/]+|the same (file|test)|`first_minutes.sh --dry-run`", proof), finding
        named = {name for name in re.findall(r"`(\w+)`", check)}
        assert named <= CHECKS, finding
        assert named or NO_CHECK.search(check), finding
    assert {check for check in CHECKS if f"`{check}`" in "".join(row[3] for row in rows)} > {"link", "graphs", "eager"}


def test_each_point_of_tensor_parallelism_says_what_proves_it():
    """A test, or that it is not written, or needs hardware."""
    rows = rows_of("tensor_parallel", "point")
    assert [*map(str, range(1, 18))] == [row[0].split()[0] for row in rows]
    for _, done, proof in rows:
        assert done
        assert NAMED.search(proof) or re.search(r"not written|needs hardware|the files above", proof)
