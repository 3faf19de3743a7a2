# SPDX-License-Identifier: Apache-2.0
"""Runs seeds in this process and prints a report of each as JSON: `python -m tests.dst.child FOLDER 1,2,3 [OPTIONS]`.

Options: `--mutant=NAME` puts a fault back (mutants.py), `-v` shows the log of the host.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tests.dst.mutants import MUTANTS
from tests.dst.scenario import make_scenario
from tests.dst.simulation import simulate
from tests.dst.world import make_checkpoints
from tokenpool.host import engine_builder, engine_host

_SEED_LIMIT_S = 120
"""A seed that takes longer does not end: the process dies with a traceback."""


def prepare(folder: Path) -> None:
    """Make this process one that runs simulations."""
    faulthandler.enable()
    for name in ("vllm", "tokenpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # A full collection for each model that comes or goes takes ten times as long as the rest of a simulation.
    engine_host.release_engine = engine_builder.release_engine = lambda error=None: None
    make_checkpoints(folder)


def main(folder: str, seeds: str, *options: str) -> None:
    """Run the seeds."""
    prepare(Path(folder))
    if "-v" in options:
        logging.getLogger("tokenpool").setLevel(logging.DEBUG)
        logging.basicConfig(level=logging.DEBUG)
    with ExitStack() as stack:
        for option in options:
            if option.startswith("--mutant="):
                stack.enter_context(MUTANTS[option.removeprefix("--mutant=")]())
        for seed in map(int, seeds.split(",")):
            print(f"seed {seed}", flush=True)
            faulthandler.dump_traceback_later(_SEED_LIMIT_S, exit=True)
            print(json.dumps(asdict(simulate(make_scenario(seed), Path(folder)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks
