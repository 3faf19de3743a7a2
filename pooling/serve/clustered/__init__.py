# SPDX-License-Identifier: Apache-2.0
"""Serving from hosts of a Ray cluster."""
