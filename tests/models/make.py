# SPDX-License-Identifier: Apache-2.0
"""Makes checkpoints: `python -m tests.models.make FOLDER KIND...`; the last line is JSON of what went wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.models.kind import make
from tests.models.table import KINDS


def main(folder: Path, *names: str) -> None:
    """Make each kind below `folder`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    failed = {}
    for name in dict.fromkeys(names):
        try:
            make(KINDS[name], name, folder / name, 100 + list(KINDS).index(name))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
