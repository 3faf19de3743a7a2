# SPDX-License-Identifier: Apache-2.0
"""Refuses a request that no message to an engine can carry, before anybody has noted it.

JSON has integers of any size and halves of surrogate pairs; messages have 64 bits and UTF-8. vLLM finds that out when
it sends, when the request is in the books already: it would be unfinished for ever, and each attempt to hand it to
another host would fail.
"""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder


def refuse_unsendable(request: EngineCoreRequest) -> None:
    """Raise VLLMValidationError if a message cannot carry `request`; O(its size), tensors are not copied."""
    try:
        MsgpackEncoder().encode(request)
    except OverflowError:
        raise VLLMValidationError("A number of the request needs more than 64 bits: use a smaller one.") from None
    except UnicodeEncodeError:
        raise VLLMValidationError("A text of the request has half of a surrogate pair: it is no UTF-8.") from None
