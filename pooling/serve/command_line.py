# SPDX-License-Identifier: Apache-2.0
"""The words after `tokenpool serve`: a pool file or models, pool flags, and flags left for vLLM's own parser."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tokenpool.config import ModelSpec, PoolConfig, Scheduling, load_pool_file
from tokenpool.errors import ConfigError, check_setting
from tokenpool.serve.key_words import read_key
from tokenpool.units import parse_bytes, parse_seconds


def _size(text: str) -> int:
    return parse_bytes(int(text) if text.isdigit() else text)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"expected a whole number, got {text!r}") from None


_POOL_FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--device-memory": ("device_memory", _size),
    "--host-memory": ("host_memory", _size),
    "--page-size": ("page_size", _size),
    "--weights": ("weights", str),
    "--kv-floor-pages": ("kv_floor_pages", _integer),
    "--admin-key": ("admin_key", lambda text: (read_key(text, "--admin-key"),)),
    "--view-key": ("view_key", lambda text: (read_key(text, "--view-key"),)),
    "--admin-models": ("admin_models", str),
    "--turn-policy": ("scheduling", Scheduling),
    "--max-request": ("max_request_bytes", _size),
    "--host": ("host", str),
    "--port": ("port", _integer),
    "--frontends": ("frontends", _integer),
    "--shutdown-timeout": ("shutdown_timeout_s", lambda text: parse_seconds(f"{text}s" if text.isdigit() else text)),
}


def pool_from_command_line(words: Sequence[str]) -> PoolConfig:
    """Read the command line; raises ConfigError naming the flag. Imports no vLLM."""
    settings, rest = _take_pool_flags(list(words))
    models, flags = _split_models(rest)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        if flags:
            raise ConfigError(
                f"{flags[0]} is no pool flag: with a pool file, write flags of vllm serve under `args` of a model",
                key=flags[0],
            )
        return replace(load_pool_file(models[0]), **settings)
    if len(models) > 1:
        _refuse_one_model_flags(flags)
    if not models:
        models, flags = _model_of_flags(flags)
    specs = tuple(ModelSpec(name=_served_name(model, flags), model=model, args=tuple(flags)) for model in models)
    return PoolConfig(models=specs, **settings)


def take_cluster(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `--cluster [auto|local|ADDRESS]` off; returns the address, None without the flag, and the other words."""
    rest = list(words)
    for i, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag != "--cluster":
            continue
        following = rest[i + 1] if i + 1 < len(rest) else ""
        if equals:
            check_setting(bool(value), flag, "needs a value: auto, local or an address such as 10.0.0.1:6379")
            return value, rest[:i] + rest[i + 1 :]
        if _is_address(following):
            return following, rest[:i] + rest[i + 2 :]
        return "auto", rest[:i] + rest[i + 1 :]
    return None, rest


def _is_address(word: str) -> bool:
    # Models and pool files may follow the flag: they are no addresses, as they have no port.
    return word in ("auto", "local") or re.fullmatch(r"(ray://)?[^/\s]+:\d+", word) is not None


def _take_pool_flags(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    settings: dict[str, Any] = {}
    rest: list[str] = []
    i = 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        i += 1
        if flag == "--api-key":
            keys, i = ([value], i) if equals else _values(words, i)
            if not keys:
                raise ConfigError("needs a value", key=flag)
            settings["api_key"] = (*settings.get("api_key", ()), *(read_key(key, flag) for key in keys))
            continue
        if flag not in _POOL_FLAGS:
            rest.append(words[i - 1])
            continue
        if not equals:
            if i >= len(words):
                raise ConfigError("needs a value", key=flag)
            value, i = words[i], i + 1
        name, parse = _POOL_FLAGS[flag]
        try:
            settings[name] = parse(value)
        except ConfigError as error:
            raise error.under(flag) from error
    return settings, rest


def _values(words: list[str], i: int) -> tuple[list[str], int]:
    start = i
    while i < len(words) and not words[i].startswith("-"):
        i += 1
    return words[start:i], i


def _split_models(words: list[str]) -> tuple[list[str], list[str]]:
    models, i = _values(words, 0)
    return models, words[i:]


def _model_of_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    for i, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if flag == "--model" and (equals or i + 1 < len(flags)):
            return [value or flags[i + 1]], flags[:i] + flags[i + (1 if equals else 2) :]
    raise ConfigError("no model: give one or more models, or a pool file (.yaml), before the flags")


def _served_name(model: str, flags: Sequence[str]) -> str:
    for i, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == "--served-model-name":
            return value if equals else flags[i + 1] if i + 1 < len(flags) else model
    return model


def _refuse_one_model_flags(flags: Sequence[str]) -> None:
    for flag in ("--served-model-name", "--model", "--lora-modules", "--tokenizer"):
        if any(word.split("=")[0].replace("_", "-") == flag for word in flags):
            raise ConfigError("belongs to one model: with several, use a pool file and its `args`", key=flag)
