# SPDX-License-Identifier: Apache-2.0
"""Goes on with a request that another engine began: the state that vLLM's own preemption leaves is built anew.

vLLM computes a preempted request again from its prompt and its output tokens, and everything that counts output
tokens (penalties, min_tokens, max_tokens, stop tokens, logits processors) goes on as if nothing had happened. A
request of a dead host is put into the same state. The scheduler then does the rest.
"""

from __future__ import annotations

from vllm.v1.engine import EngineCoreRequest


class ContinuedRequest(EngineCoreRequest, array_like=True, omit_defaults=True, gc=False):
    """An EngineCoreRequest, as first sent, with the output tokens that its client has got already.

    On the wire it is vLLM's message with one more field at the end, which nobody but a frontend of the pool can set.
    """

    delivered_token_ids: list[int] = []
