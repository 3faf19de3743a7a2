# SPDX-License-Identifier: Apache-2.0
"""Why a host ended a request, where a frontend has to know it."""

from __future__ import annotations

GRAMMAR_FAILED = "the grammar failed"
"""Stop reason of a request that ended with an error because of its grammar."""
