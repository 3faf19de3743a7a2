# SPDX-License-Identifier: Apache-2.0
"""Several frontends of one pool, and the process that keeps them."""
