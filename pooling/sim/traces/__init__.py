# SPDX-License-Identifier: Apache-2.0
"""Traces that others have published, as workloads."""
