# SPDX-License-Identifier: Apache-2.0
"""The conformance battery: the same requests to plain `vllm serve` and to pools, whose answers are compared."""
