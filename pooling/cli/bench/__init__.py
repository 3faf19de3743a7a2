# SPDX-License-Identifier: Apache-2.0
"""`tokenpool bench`: load on a running server, and what it says about goodput."""
