# SPDX-License-Identifier: Apache-2.0
"""Write the dashboards and alerts into the chart; `make dashboards`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from deploy.dashboards.alerts import rules
from deploy.dashboards.grafana import dashboard
from deploy.dashboards.panels import DEVICE, OVERVIEW

FILES = Path(__file__).parents[1] / "chart" / "files"


def generated() -> dict[Path, str]:
    """Path and text of every file that is made."""
    boards = {
        "overview": dashboard("tokenpool-overview", "tokenpool: models", OVERVIEW),
        "device": dashboard("tokenpool-device", "tokenpool: device", DEVICE),
    }
    folder = FILES / "dashboards"
    files = {folder / f"{name}.json": json.dumps(board, indent=1) + "\n" for name, board in boards.items()}
    return files | {FILES / "alerts.yaml": yaml.safe_dump(rules(), sort_keys=False, width=200)}


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path)
