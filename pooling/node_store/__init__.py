# SPDX-License-Identifier: Apache-2.0
"""Host copies of weights that all hosts of a node share: a keeper process, its books, and what hosts ask it."""
