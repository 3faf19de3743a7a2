# SPDX-License-Identifier: Apache-2.0
"""How many sequences a request asks the engine for, read from its body before anything is begun. Imports no vLLM.

By the names of fields, not of routes, so that routes which vLLM gets one day count too. What no body tells, such as the
pieces of a long recording or the turns of a tool loop, is counted as it comes; see `tenant_call`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

_MOST_DIGITS = 9
_LISTS = ("documents", "items", "queries", "text_1", "text_2", "data_1", "data_2", "texts", "inputs", "images")
"""Each element is one sequence, of whatever type it is."""
_OTHERS = ("prompt", "prompt_embeds", "input", "messages", "questions", "n", "sampling_params")
_Work: Any = msgspec.defstruct("_Work", [(name, Any, None) for name in (*_OTHERS, *_LISTS)])
_DECODE = msgspec.json.Decoder(_Work).decode


def count_sequences(body: bytes) -> int:
    """The prompts of a body times its `n`, at least 1; 1 for what is no JSON object."""
    try:
        work = _DECODE(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        try:  # what vLLM's json.loads takes and msgspec does not
            fields = json.loads(body)
            work = _Work(**{name: fields[name] for name in _Work.__struct_fields__ if name in fields})
        except (ValueError, TypeError, RecursionError):
            return 1
    prompts = max(_prompts(value) for value in (work.prompt, work.prompt_embeds, work.input, work.messages))
    for name in _LISTS:
        value = getattr(work, name)
        prompts = max(prompts, len(value) if isinstance(value, list) else 1)
    if isinstance(work.questions, dict):
        prompts = max(prompts, len(work.questions))
    n = _number(work.n)
    if isinstance(work.sampling_params, dict):
        n = max(n, _number(work.sampling_params.get("n", 1)))
    return prompts * n


def _prompts(value: Any) -> int:
    """Several texts, lists of token ids or conversations; one list of token ids, or of messages, is one prompt."""
    if not isinstance(value, list) or not value:
        return 1
    return len(value) if any(isinstance(end, str | list) for end in (value[0], value[-1])) else 1


def _number(value: Any) -> int:
    """A count as vLLM's models read it: texts and floats that are whole numbers count as such."""
    if isinstance(value, str) and len(value) < _MOST_DIGITS and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer() and value < 10**_MOST_DIGITS:
        value = int(value)
    return max(1, value) if isinstance(value, int) else 1
