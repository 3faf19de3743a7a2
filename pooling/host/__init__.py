# SPDX-License-Identifier: Apache-2.0
"""The engine host process: everything that imports vLLM's engine side."""
