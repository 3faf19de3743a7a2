# SPDX-License-Identifier: Apache-2.0
"""Turn policies, one per file, found through the entry points `tokenpool.turn_policies`."""
