# SPDX-License-Identifier: Apache-2.0
"""What the deployment tests share: a helm, and each values file rendered once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.deploy.charts import NO_HELM, VALUES_FILES, Manifest, helm_binary, render


@pytest.fixture(scope="session")
def helm() -> str:
    """A helm binary; skips loudly without one."""
    binary = helm_binary()
    if binary is None:
        pytest.skip(NO_HELM)
    return binary


@pytest.fixture(scope="session")
def rendered(helm: str) -> Callable[[Path], list[Manifest]]:
    """Renders a values file, once."""
    return cache(lambda path: render("-f", str(path)))


@pytest.fixture(params=VALUES_FILES, ids=lambda path: path.name.removesuffix("-values.yaml"))
def manifests(request: pytest.FixtureRequest, rendered: Callable[[Path], list[Manifest]]) -> list[Manifest]:
    """The objects of each file in deploy/chart/ci, in turn."""
    return rendered(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud, once each, why deployment tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = [report.longrepr[2] for report in skipped if report.nodeid.startswith("tests/deploy/")]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line(f"{reasons.count(reason)} tests: {reason.removeprefix('Skipped: ')}")
