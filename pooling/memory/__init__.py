# SPDX-License-Identifier: Apache-2.0
"""Device pages: who has them, and the KV arena made of them. Imports neither vllm nor ray."""
