# SPDX-License-Identifier: Apache-2.0
"""Makes a failing seed small: drops requests and events as long as it fails. `python -m tests.dst.shrink SEED`."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path

from tests.dst.child import prepare
from tests.dst.scenario import Scenario, make_scenario
from tests.dst.simulation import simulate


def shrink(scenario: Scenario, folder: Path) -> tuple[Scenario, str | None]:
    """The smallest scenario found that still breaks a law, and how; None if the given one breaks none."""
    violation = simulate(copy.deepcopy(scenario), folder).violation
    if violation is None:
        return scenario, None
    for part in ("requests", "events"):
        size = len(getattr(scenario, part))
        while size:
            start = 0
            while start < len(getattr(scenario, part)):
                smaller = copy.deepcopy(scenario)
                del getattr(smaller, part)[start : start + size]
                found = simulate(copy.deepcopy(smaller), folder).violation
                if found is None:
                    start += size
                else:
                    scenario, violation = smaller, found
            size //= 2
    return scenario, violation


def main(seed: str) -> None:
    """Shrink a seed and print what is left."""
    with tempfile.TemporaryDirectory(prefix="dst-") as folder:
        prepare(Path(folder))
        scenario, violation = shrink(make_scenario(int(seed)), Path(folder))
        for name in scenario.__dataclass_fields__:
            value = getattr(scenario, name)
            for item in value if isinstance(value, list) else [value]:
                print(f"{name}: {item}")
        print(f"violation: {violation}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
