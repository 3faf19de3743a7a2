# SPDX-License-Identifier: Apache-2.0
"""What single features of vLLM cost and gain in a pool."""
