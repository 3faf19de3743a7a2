# SPDX-License-Identifier: Apache-2.0
"""tokenpool: many LLMs share few GPUs, several real vLLM engines on one memory budget."""

__version__ = "0.1.0"
