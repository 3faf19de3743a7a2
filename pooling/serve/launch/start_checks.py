# SPDX-License-Identifier: Apache-2.0
"""What a model's flags name is looked for before anything starts: files, plugins, parsers, classes, adapters.

Plain vLLM finds most of it when it starts, some of it after the weights are loaded.
"""

from __future__ import annotations

import importlib
import inspect
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from vllm.plugins import IO_PROCESSOR_PLUGINS_GROUP
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import AssistantTracker
from vllm.tool_parsers import ToolParserManager
from vllm.utils.import_utils import import_from_path

from tokenpool.access_config import is_path
from tokenpool.errors import ConfigError, config_errors_under, show
from tokenpool.serve.launch.checkpoint import checkpoint_bytes

_JINJA_MODES = ("auto", "hf", "slow")
"""Values of --tokenizer-mode whose chat templates are Jinja's."""


def check_start(name: str, args: Namespace) -> None:
    """Refuse what the model's app or engine would not start with; raises ConfigError of the flag and the model.

    Imports what the flags name, as the start would.
    """
    with config_errors_under(source=f"model {name!r}"):
        load_plugins(args)
        for check in _CHECKS:
            check(args)


def load_plugins(args: Namespace) -> None:
    """Import the parser plugins of a model, each once per process; raises ConfigError that names the flag."""
    structured = args.structured_outputs_config.reasoning_parser_plugin
    plugins = (
        ("--tool-parser-plugin", args.tool_parser_plugin),
        ("--reasoning-parser-plugin", args.reasoning_parser_plugin or structured),
    )
    for flag, plugin in plugins:
        if plugin:
            _try(flag, plugin, partial(_import_plugin, os.path.abspath(plugin), plugin))


@cache
def _import_plugin(path: str, plugin: str) -> None:
    if plugin.endswith(".py"):
        import_from_path(os.path.splitext(os.path.basename(path))[0], path)
    else:
        importlib.import_module(plugin)


def _try(flag: str, value: str, look: Callable[[], Any]) -> Any:
    try:
        return look()
    except ConfigError as error:
        raise error.under(flag) from error
    except Exception as error:  # whatever code of the user raises
        raise ConfigError(f"{value} cannot be imported: {_said(error)}", key=flag) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _check_files(args: Namespace) -> None:
    logging_file = args.logging_config and args.logging_config.pylogging_config_file
    files = (
        ("--tokenizer", args.tokenizer),
        ("--hf-config-path", args.hf_config_path),
        ("--log-config-file", logging_file and os.path.abspath(logging_file)),
        ("--speculative-config", draft_model_of(args)),
    )
    for flag, path in files:
        if path and is_path(path) and not os.path.exists(os.path.expanduser(path)):
            raise ConfigError(f"missing path {path}: correct it", key=flag)


def draft_model_of(args: Namespace) -> str | None:
    """The folder or the name on the hub of a draft model; None where the model's own checkpoint has it, or nothing."""
    config = args.speculative_config or {}
    method = args.spec_method or config.get("method") or ""
    drafter = args.spec_model or config.get("model")
    beside = method.endswith("mtp") or drafter in ("ngram", "[ngram]")  # layers of the model itself, or a method's name
    return None if beside else drafter


def _check_chat_template(args: Namespace) -> None:
    if args.chat_template is None:
        return
    try:
        text = load_chat_template(args.chat_template)
        if args.tokenizer_mode in _JINJA_MODES:
            extensions = [AssistantTracker, jinja2.ext.loopcontrols]
            ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).compile(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"is no good template: line {error.lineno}: {error.message}"
        raise ConfigError(problem, key="--chat-template") from error
    except Exception as error:  # vLLM raises kinds of its own
        raise ConfigError(f"cannot be read: {_said(error)}", key="--chat-template") from error


def _check_parsers(args: Namespace) -> None:
    reasoning = args.reasoning_parser or args.structured_outputs_config.reasoning_parser
    parsers = (
        ("--tool-call-parser", args.tool_call_parser, ToolParserManager, "--tool-parser-plugin"),
        ("--reasoning-parser", reasoning, ReasoningParserManager, "--reasoning-parser-plugin"),
    )
    for flag, parser, manager, plugin in parsers:
        if parser and parser not in (known := manager.list_registered()):
            problem = f"there is no {show(parser)}: give one of {', '.join(known)}, or {plugin} that brings it"
            raise ConfigError(problem, key=flag)


def _check_classes(args: Namespace) -> None:
    for flag, name in _class_names(args):
        _try(flag, name, partial(_resolve, name))
    for name in args.middleware:
        find_middleware(name)
    plugins = {entry.name for entry in entry_points(group=IO_PROCESSOR_PLUGINS_GROUP)}
    if (plugin := args.io_processor_plugin) and plugin not in plugins:
        known = ", ".join(sorted(plugins)) or "(none)"
        raise ConfigError(f"{plugin} is not installed; installed: {known}", key="--io-processor-plugin")


def find_middleware(name: str) -> Any:
    """The class or async function that `--middleware` names; raises ConfigError."""
    module, _, attribute = name.rpartition(".")
    found = _try("--middleware", name, lambda: _find(name, module, attribute))
    if not (inspect.isclass(found) or inspect.iscoroutinefunction(found)):
        raise ConfigError(f"{name} is neither a class nor an async function", key="--middleware")
    return found


def _class_names(args: Namespace) -> Iterator[tuple[str, str]]:
    if isinstance(args.scheduler_cls, str):
        yield "--scheduler-cls", args.scheduler_cls
    if args.worker_extension_cls:
        yield "--worker-extension-cls", args.worker_extension_cls
    if manager := args.ec_manager_config.encoder_cache_manager_cls:
        yield "--ec-manager-config", manager
    for name in args.logits_processors or ():
        yield "--logits-processors", name


def _resolve(name: str) -> Any:
    """What `module.name` or, as logits processors are written, `module:name` stands for."""
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    return _find(name, module, attribute)


def _find(name: str, module: str, attribute: str) -> Any:
    if not module or not attribute:
        raise ConfigError(f"{show(name)} names nothing: write module.name")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _check_adapters(args: Namespace) -> None:
    adapters = [("--lora-modules", adapter.name, adapter.path) for adapter in args.lora_modules or ()]
    adapters += [("--default-mm-loras", name, path) for name, path in (args.default_mm_loras or {}).items()]
    for flag, name, given in adapters:
        path = os.path.expanduser(given)
        if not args.enable_lora:
            raise ConfigError("needs --enable-lora beside it", key=flag)
        if not os.path.exists(path):
            if is_path(given):
                raise ConfigError(f"adapter {show(name)}: missing path {given}: correct it", key=flag)
            continue  # a name of the hub
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ConfigError(f"adapter {show(name)}: {given} has no adapter_config.json", key=flag)
        try:
            size = checkpoint_bytes(Path(path))
        except ConfigError as error:
            raise ConfigError(f"adapter {show(name)}: {error.problem}", key=flag) from error
        if not size:
            raise ConfigError(f"adapter {show(name)}: {given} has no weights", key=flag)


_CHECKS = (_check_files, _check_chat_template, _check_parsers, _check_classes, _check_adapters)
