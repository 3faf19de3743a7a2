# SPDX-License-Identifier: Apache-2.0
"""The words after `tokenpool serve`: a pool file or models, pool flags, and flags left for vLLM's own parser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tokenpool.cli.key_words import read_key
from tokenpool.cli.pool_flags import POOL_FLAGS, read_flag
from tokenpool.config import ModelSpec, PoolConfig, load_pool_file
from tokenpool.engine_flags import take_config_file
from tokenpool.errors import ConfigError, check_setting

_SHORTEST = {
    "--api-key": "--api-k",
    "--host": "--hos",
    "--port": "--por",
    "--shutdown-timeout": "--shu",
    "--served-model-name": "--ser",
    "--lora-modules": "--lora-m",
}
"""The fewest letters that vLLM's parser takes for the flags that are read here."""


def pool_from_command_line(words: Sequence[str]) -> PoolConfig:
    """Read the command line; raises ConfigError naming the flag. Imports no vLLM.

    The flags of a `--config` file count as if they stood there, before those that do; but not its `model` beside one.
    """
    from_file, given = take_config_file(words)
    settings, rest = _take_pool_flags(given)
    models, flags = _split_models(rest)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        _refuse_flags_of_vllm(["--config"] if len(given) < len(words) else flags)
        return replace(load_pool_file(models[0]), **settings)
    file_settings, file_flags = _take_pool_flags(from_file)
    settings = {**file_settings, **settings}
    if models:
        _, file_flags = _take_model(file_flags)
        _refuse_model_flag(flags)
        flags = [*file_flags, *flags]
    else:
        model, flags = _take_model([*file_flags, *flags])
        if model is None:
            raise ConfigError("no model: give one or more models, or a pool file (.yaml), before the flags")
        models = [model]
    if len(models) > 1:
        _refuse_one_model_flags(flags)
    specs = tuple(ModelSpec(name=_served_name(model, flags), model=model, args=tuple(flags)) for model in models)
    return PoolConfig(models=specs, **settings)


def has_api_key(words: Sequence[str]) -> bool:
    """Whether the flags, or those of a `--config` file, give a key for clients."""
    return any(flag == "--api-key" for part in take_config_file(words) for flag, _ in _split_pool_flags(part)[0])


def pool_file_of(words: Sequence[str]) -> str | None:
    """The pool file that the command line names; None if it names models."""
    models, _ = _split_models(_split_pool_flags(take_config_file(words)[1])[1])
    return models[0] if len(models) == 1 and models[0].endswith((".yaml", ".yml")) else None


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
    """The settings that the pool's flags in `words` give, and the other words."""
    given, rest = _split_pool_flags(words)
    settings: dict[str, Any] = {}
    for flag, values in given:
        if flag == "--api-key":
            settings["api_key"] = (*settings.get("api_key", ()), *(read_key(key, flag) for key in values))
            continue
        settings |= read_flag(flag, values[0])
    return settings, rest


def _split_pool_flags(words: list[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The pool's flags in `words`, each with its values as they stand there, and the other words."""
    given: list[tuple[str, list[str]]] = []
    rest: list[str] = []
    i = 0
    while i < len(words):
        flag, equals, value = words[i].partition("=")
        flag = _full_name(flag)
        i += 1
        if flag != "--api-key" and flag not in POOL_FLAGS:
            rest.append(words[i - 1])
            continue
        values = [value] if equals else []
        if not equals and flag == "--api-key":
            values, i = _values(words, i)
        elif not equals:
            values, i = words[i : i + 1], i + 1
        if not values:
            raise ConfigError("needs a value", key=flag)
        given.append((flag, values))
    return given, rest


def _values(words: list[str], i: int) -> tuple[list[str], int]:
    start = i
    while i < len(words) and not words[i].startswith("-"):
        i += 1
    return words[start:i], i


def _split_models(words: list[str]) -> tuple[list[str], list[str]]:
    models, i = _values(words, 0)
    return models, words[i:]


def _full_name(flag: str) -> str:
    """The flag that is meant, if it is one that is read here: with dashes, and written out."""
    flag = flag.replace("_", "-") if flag.startswith("--") else flag
    return next((name for name, least in _SHORTEST.items() if name.startswith(flag) and flag.startswith(least)), flag)


def _take_model(flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `--model M` off: the last one, as the words of a file come first."""
    model, rest, i = None, [], 0
    while i < len(flags):
        flag, equals, value = flags[i].partition("=")
        i += 1
        if flag != "--model" or not (equals or i < len(flags)):
            rest.append(flags[i - 1])
            continue
        model, i = (value, i) if equals else (flags[i], i + 1)
    return model, rest


def _served_name(model: str, flags: Sequence[str]) -> str:
    name = model
    for i, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        if _full_name(flag) == "--served-model-name":
            name = value if equals else flags[i + 1] if i + 1 < len(flags) else model
    return name


def _refuse_flags_of_vllm(flags: Sequence[str]) -> None:
    if flags:
        raise ConfigError(
            f"{flags[0]} is no pool flag: with a pool file, write flags of vllm serve under `args` of a model",
            key=flags[0],
        )


def _refuse_model_flag(flags: Sequence[str]) -> None:
    if any(word.split("=")[0] == "--model" for word in flags):
        raise ConfigError("is given beside a model: name each model once, before the flags", key="--model")


def _refuse_one_model_flags(flags: Sequence[str]) -> None:
    for flag in ("--served-model-name", "--lora-modules", "--tokenizer"):
        if any(_full_name(word.split("=")[0]) == flag for word in flags):
            raise ConfigError("belongs to one model: with several, use a pool file and its `args`", key=flag)
