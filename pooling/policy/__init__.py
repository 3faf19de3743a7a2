# SPDX-License-Identifier: Apache-2.0
"""Decisions as pure functions of values. Imports neither vllm nor ray."""
