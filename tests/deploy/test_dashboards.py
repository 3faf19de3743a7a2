# SPDX-License-Identifier: Apache-2.0
"""Dashboards and alerts: generated, loadable, and naming only what a server exports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.dashboards.__main__ import FILES, generated
from deploy.dashboards.alerts import rules
from deploy.dashboards.series import SERIES, TARGET_LABELS, ours, select
from tests.deploy.promql import problems

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((FILES / "dashboards").glob("*.json"))
ALERTS = FILES / "alerts.yaml"


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel, variable and alert."""
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            yield from ((f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"])
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.stem}: ${variable['name']}", variable["query"]
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


EXPRESSIONS = list(expressions())


def promtool() -> str:
    """PROMTOOL_BIN, what `make test-deploy` fetched, or the one on the PATH; skips loudly without."""
    fetched = ROOT / "build" / "tools" / "promtool"
    binary = os.environ.get("PROMTOOL_BIN") or (str(fetched) if fetched.exists() else shutil.which("promtool"))
    if binary is None:
        pytest.skip("ALERTS ARE NOT RUN BY PROMETHEUS ITSELF: no promtool on the PATH; PROMTOOL_BIN names one")
    return binary


def test_committed_files_are_what_the_generator_makes():
    """`make dashboards` would change nothing."""
    files = {path: path.read_text() for path in (*DASHBOARDS, ALERTS)}
    assert files == generated(), "run make dashboards"


@pytest.mark.parametrize("where, expr", EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_every_expression_names_what_exists(where, expr):
    """Every panel, variable and alert can be read and names series and labels that a server exports."""
    assert problems(expr, SERIES, TARGET_LABELS) == []


@pytest.mark.parametrize(
    "expr, problem",
    [
        ("sum (rate(tokenpool:tokens[5m]))", "unknown series or function tokenpool:tokens"),
        ('tokenpool:pages{model="a"}', "no label model"),
        ("sum by (model) (tokenpool:pages)", "unknown label model"),
        ("sum (rate(tokenpool:tokens_total[5 m]))", "bad window [5 m]"),
        ("rat(tokenpool:tokens_total[5m])", "unknown series or function rat"),
        ("sum (tokenpool:pages", "a ) is missing"),
        ("tokenpool:pages)", "a ) too much"),
        ("tokenpool:pages{use='kv'}", "bad matcher use='kv'\""),
        ("tokenpool:pages % 2", "cannot be read at: ' % 2'"),
    ],
)
def test_the_reader_finds_faults(expr, problem):
    """The check above can fail."""
    assert problems(expr, SERIES, TARGET_LABELS) == [problem]


def test_the_generator_refuses_unknown_names():
    """A metric or label that is renamed stops `make dashboards`."""
    with pytest.raises(KeyError):
        ours("token")
    with pytest.raises(KeyError):
        ours("tokens", 'model="a"')
    with pytest.raises(KeyError):
        select("vllm:gpu_prefix_cache_hits_total")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_well_formed(path):
    """Ids are unique, panels lie side by side and do not overlap, every one has a description and a query."""
    board = json.loads(path.read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["description"] and panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_every_legend_names_labels_that_the_query_keeps():
    """{{model_name}} in a legend stays empty unless the expression groups by it."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                kept = re.findall(r"by \(([^)]*)\)", target["expr"])
                kept = {label.strip() for labels in kept for label in labels.split(",")}
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]


def test_every_alert_is_in_the_operations_guide():
    """docs/operations.md says what to do about each."""
    text = (ROOT / "docs" / "operations.md").read_text()
    missing = [rule["alert"] for rule in rules()["groups"][0]["rules"] if f"`{rule['alert']}`" not in text]
    assert not missing


def test_prometheus_reads_every_expression(tmp_path):
    """promtool accepts the alerts, and each panel's expression as a recording rule."""
    binary = promtool()
    panels = [expr for where, expr in EXPRESSIONS if "label_values" not in expr]
    records = [{"record": f"r{i}", "expr": expr.replace("$__rate_interval", "5m")} for i, expr in enumerate(panels)]
    panel_rules = tmp_path / "panels.yaml"
    panel_rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    done = subprocess.run([binary, "check", "rules", str(ALERTS), str(panel_rules)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def series(values: str, name: str, **labels: str) -> dict[str, str]:
    inner = ",".join(f'{key}="{value}"' for key, value in {"instance": "pod", **labels}.items())
    return {"series": f"{name}{{{inner}}}", "values": values}


FIRES = {
    "TokenpoolAttainmentLow": [
        series("0+80x60", "tokenpool:tokens_on_time_total", model_name="a"),
        series("0+100x60", "tokenpool:tokens_total", model_name="a"),
    ],
    "TokenpoolThrashing": [series("0+30x60", "tokenpool:switch_wait_seconds_total")],
    "TokenpoolQueueGrowing": [series("0+1x60", "tokenpool:queue_requests", model_name="a", state="waiting")],
    "TokenpoolRefusing": [series("0+60x60", "tokenpool:refused_requests_total", model_name="a", status="429")],
    "TokenpoolHostDown": [series("2x60", "tokenpool:models", state="unavailable")],
    "TokenpoolModelFailed": [series("1x60", "tokenpool:model_failed", model_name="a")],
    "TokenpoolPoolFileRefused": [series("0x60", "tokenpool:pool_file_ok")],
    "TokenpoolHostRestarts": [series("0+1x60", "tokenpool:host_restarts_total")],
    "TokenpoolClusterHeadAway": [series("0x60", "tokenpool:cluster_head_up")],
    "TokenpoolCrashedSteps": [series("0+1x60", "tokenpool:crashed_steps_total", model_name="a")],
    "TokenpoolLedgerMismatch": [series("0x60", "tokenpool:ledger_ok")],
    "TokenpoolAbsent": [],
}
HEALTHY = [
    series("0+100x60", "tokenpool:tokens_on_time_total", model_name="a"),
    series("0+100x60", "tokenpool:tokens_total", model_name="a"),
    series("0x60", "tokenpool:tokens_total", model_name="idle"),
    series("0x60", "tokenpool:tokens_on_time_total", model_name="idle"),
    series("0+6x60", "tokenpool:switch_wait_seconds_total"),
    series("30x60", "tokenpool:queue_requests", model_name="a", state="waiting"),
    series("0+1x60", "tokenpool:refused_requests_total", model_name="a", status="429"),
    series("3x60", "tokenpool:models", state="ready"),
    series("0x60", "tokenpool:models", state="unavailable"),
    series("0x60", "tokenpool:model_failed", model_name="a"),
    series("2x60", "tokenpool:host_restarts_total"),
    series("5x60", "tokenpool:crashed_steps_total", model_name="a"),
    series("1x60", "tokenpool:ledger_ok"),
    series("1x60", "tokenpool:cluster_head_up"),
]


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    """Prometheus' own evaluation: each fires on its fault within an hour, and none in a healthy pool."""
    binary = promtool()
    assert FIRES.keys() == {rule["alert"] for rule in rules()["groups"][0]["rules"]}
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text())
    cases = [{"interval": "1m", "input_series": HEALTHY, "alert_rule_test": [
        {"eval_time": "55m", "alertname": name, "exp_alerts": []} for name in FIRES]}]  # fmt: skip
    (tmp_path / "healthy.yaml").write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "tests": cases}))
    done = subprocess.run([binary, "test", "rules", "healthy.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, faults in FIRES.items():
        test = {"interval": "1m", "input_series": faults, "alert_rule_test": [
            {"eval_time": "55m", "alertname": name, "exp_alerts": []}]}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "tests": [test]}))
        done = subprocess.run([binary, "test", "rules", f"{name}.yaml"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and re.search(rf"got:\[[^\]]*alertname=\"{name}\"", done.stdout + done.stderr), name
