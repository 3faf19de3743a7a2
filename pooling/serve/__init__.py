# SPDX-License-Identifier: Apache-2.0
"""The frontend: command line, router, one vLLM app per model, supervision of the host."""
