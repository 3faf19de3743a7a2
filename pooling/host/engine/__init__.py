# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine of many in a process: its core, its worker, its requests."""
