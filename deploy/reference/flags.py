# SPDX-License-Identifier: Apache-2.0
"""The table of the pool's own flags, with the texts that `tokenpool serve --help` prints."""

from __future__ import annotations

from deploy.reference.tables import code, table
from tokenpool.cli.pool_flags import flag_texts


def flag_table() -> str:
    """Each flag of the pool with its help."""
    return table(["flag", "meaning"], ([code(flag), text] for flag, text in flag_texts().items()))
