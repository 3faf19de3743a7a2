# SPDX-License-Identifier: Apache-2.0
"""A request that another engine began, as a frontend sends it on."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreRequest


# What vLLM has is Any for mypy, which so does not see that this is a msgspec.Struct.
class ContinuedRequest(EngineCoreRequest, array_like=True, omit_defaults=True, gc=False):  # type: ignore[call-arg]
    """An EngineCoreRequest, as first sent, with the output tokens that its client has got already.

    On the wire it is vLLM's message with one more field at the end, which nobody but a frontend of the pool can set.
    """

    delivered_token_ids: list[int] = []  # noqa: RUF012 - msgspec gives each request its own
