# SPDX-License-Identifier: Apache-2.0
"""Runs seeds in this process and prints a report of each as a line of JSON: `python -m tests.dst.child FOLDER A B`."""

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
from tests.dst.simulation import simulate
from tests.dst.world import make_checkpoints
from tokenpool.host import engine_builder, engine_host

_SEED_LIMIT_S = 30
"""A seed that takes longer does not end: the process dies with a traceback."""


def main(folder: str, first: str, end: str, *options: str) -> None:
    """Run the seeds from `first` on, up to `end`."""
    faulthandler.enable()
    logging.getLogger("tokenpool").setLevel(logging.DEBUG if "-v" in options else logging.CRITICAL + 1)
    if "-v" in options:
        logging.basicConfig(level=logging.DEBUG)
    # A full collection for each model that comes or goes takes ten times as long as the rest of a simulation.
    engine_host.release_engine = engine_builder.release_engine = lambda error=None: None
    make_checkpoints(Path(folder))
    mutants = [MUTANTS[option.removeprefix("--mutant=")]() for option in options if option.startswith("--mutant=")]
    with ExitStack() as stack:
        for mutant in mutants:
            stack.enter_context(mutant)
        for seed in range(int(first), int(end)):
            print(f"seed {seed}", flush=True)
            faulthandler.dump_traceback_later(_SEED_LIMIT_S, exit=True)
            print(json.dumps(asdict(simulate(seed, Path(folder)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks
