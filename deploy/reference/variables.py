# SPDX-License-Identifier: Apache-2.0
"""The table of environment variables, from the module that reads them."""

from __future__ import annotations

from deploy.reference.tables import code, table
from tokenpool.settings import VARIABLES


def variable_table() -> str:
    """Each variable that a user may set, or finds set, with what it changes."""
    rows = ([code(variable.name), variable.readers, variable.text] for variable in VARIABLES if variable.readers)
    return table(["variable", "read by", "meaning"], rows)
