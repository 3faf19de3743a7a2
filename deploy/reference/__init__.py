# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/ that are read out of the code: keys of the pool file, flags, metrics."""
