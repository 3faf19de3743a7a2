# SPDX-License-Identifier: Apache-2.0
"""Kinds with quantised weights."""

from __future__ import annotations

from typing import Any

from tests.models.kind import Kind
from tests.models.text import EXPERTS

_BITSANDBYTES: dict[str, Any] = {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}

QUANTISED = {
    "q_w8a8_int8": Kind("Llama", scheme="int8"),
    "q_w8a8_int8_static": Kind("Llama", scheme="int8_static"),
    "q_w8a8_int8_asymmetric": Kind("Llama", scheme="int8_asymmetric"),
    "q_w8a8_fp8": Kind("Llama", scheme="fp8"),
    "q_w4a16": Kind("Llama", scheme="w4a16"),
    "q_gptq": Kind("Llama", scheme="gptq"),
    "q_awq": Kind("Llama", scheme="awq"),
    "q_fp8": Kind("Llama", scheme="fp8_native"),
    "q_fp8_blocks": Kind("Llama", {"num_key_value_heads": 4}, scheme="fp8_blocks"),
    "q_fp8_online": Kind("Llama", args={"quantization": "fp8"}),
    "q_kv_fp8": Kind("Llama", args={"kv_cache_dtype": "fp8"}),
    "q_mxfp4": Kind(EXPERTS["gpt_oss"].config, EXPERTS["gpt_oss"].more, scheme="mxfp4"),
    "q_bitsandbytes": Kind("Llama", args=_BITSANDBYTES),
}
