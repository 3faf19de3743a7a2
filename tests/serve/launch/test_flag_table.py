# SPDX-License-Identifier: Apache-2.0
"""Every flag of `vllm serve` is served, taken over by the pool, or refused with a reason: none is read and ignored."""

from __future__ import annotations

import ast
import copy
import re
from collections import defaultdict
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import (
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.helpers.devices.object_graph import snapshot
from tests.helpers.serve_flags import APP, BESIDE, ENGINE, TABLE, first_name, names, use_of
from tokenpool.config import ModelSpec
from tokenpool.errors import ModelRefusedError, PoolError
from tokenpool.serve.launch import launch_plan
from tokenpool.serve.launch.flag_table import PORT, REFUSED, TAKEN_OVER
from tokenpool.serve.launch.launch_plan import plan_model

pytestmark = pytest.mark.vllm

VLLM = Path(vllm.__file__).parent
OURS = Path(launch_plan.__file__).parents[1]

STAND_INS = re.compile(
    r"entrypoints/(cli/|llm\.py|grpc_server|launchers/(api_server/entry|launcher|dp_supervisor|grpc_server|run_batch|render/))"
    r"|v1/executor/(?!abstract|uniproc_executor)|v1/engine/(utils|coordinator|llm_engine)\.py|v1/utils\.py"
    r"|platforms/(?!cpu|cuda)|benchmarks/"
)
"""Modules of vLLM whose place the pool takes: what only they read has no effect in a pool."""
DECLARATIONS = re.compile(r"engine/arg_utils\.py|config/")
CHECKS = ("start_checks.py", "poolability.py", "flags.py")
"""Our modules that look at flags only to refuse them."""

READ_BY_ITS_CONFIG = names("""
    allow-deprecated-quantization collect-detailed-traces config-format disable-cascade-attn enable-lora
    enable-mamba-cache-stochastic-rounding enable-return-routed-experts fail-on-environ-validation hf-config-path
    limit-mm-per-prompt lora-target-modules mamba-backend mamba-cache-philox-rounds mamba-ssu-algorithm
    max-parallel-loading-workers mm-processor-device model-class-overrides optimization-level performance-mode runner
    scheduler-cls scheduling-policy show-hidden-metrics-for-version spec-method spec-model spec-tokens
""")
"""Flags that vLLM turns into something else while it makes its config, which the pool has it make."""

SAME_CONFIG = names("""
    all2all-backend cudagraph-capture-sizes dcp-comm-backend disable-cascade-attn
    disable-nccl-for-dp-synchronization enable-dbo enable-flashinfer-autotune enable-mm-embeds
    fail-on-environ-validation interleave-mm-strings ir-op-priority language-model-only limit-mm-per-prompt
    media-io-kwargs mm-device-do-normalize mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path
    mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-only mm-encoder-tp-mode
    mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-device skip-mm-profiling
    video-pruning-method video-pruning-rate
""")
"""Flags whose use changes nothing in vLLM's own config of a small text model on one CPU."""

TRIED_BY_HAND = {
    "--aggregate-engine-logging": "test_flag_effects.py",
    "--enable-log-requests": "test_flag_effects.py",
    "--disable-log-stats": "test_flag_effects.py",
    "--tool-parser-plugin": "test_start_checks.py",
    "--reasoning-parser-plugin": "test_start_checks.py",
    "--enable-ssl-refresh": "test_tls.py",
    "--ssl-ciphers": "test_tls.py",
    "--config": "test_config_file.py",
    "--served-model-name": "test_names.py",
    "--allowed-origins": "test_cors.py",
    "--middleware": "test_port.py",
    "--enable-request-id-headers": "test_port.py",
}
"""Flags with a test of their effect of their own, in the file named."""


@cache
def vllms_parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def actions_of(*kinds: str) -> dict[str, tuple[str, ...]]:
    flags = frozenset(chain.from_iterable(TABLE[kind] for kind in kinds))
    return {name: use_of(action) for action in vllms_parser()._actions if (name := first_name(action)) in flags}


@cache
def readers() -> dict[str, set[str]]:
    """By attribute the files that read it and are there in a pool: of vLLM, and of the server what is no mere check."""
    found: dict[str, set[str]] = defaultdict(set)
    files = {name: path for path in VLLM.rglob("*.py") if not STAND_INS.match(name := str(path.relative_to(VLLM)))}
    files |= {str(path.relative_to(OURS.parent)): path for path in OURS.rglob("*.py") if path.name not in CHECKS}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[node.attr].add(name)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
                found[getattr(node.args[1], "value", "")].add(name)
    return found


def dest_of(flag: str) -> str:
    return vllms_parser()._option_string_actions[flag].dest


def test_every_flag_is_in_the_table_once() -> None:
    """A flag that a later vLLM brings fails here until it is decided what becomes of it."""
    listed = list(chain.from_iterable(TABLE.values()))
    there = {name for action in vllms_parser()._actions if (name := first_name(action))} - {"--help"}

    assert {name for name in listed if listed.count(name) > 1} == set()
    assert there == set(listed)


@pytest.mark.slow
def test_whatever_goes_to_the_engine_is_read_by_somebody_who_is_there() -> None:
    """Not only by those parts of vLLM whose place the pool takes, unless vLLM's config has used it up before."""
    ignored = {flag for flag in ENGINE if all(DECLARATIONS.match(file) for file in readers()[dest_of(flag)])}

    assert ignored == READ_BY_ITS_CONFIG


@pytest.mark.slow
def test_whatever_is_of_the_app_or_the_port_is_read_by_somebody_who_is_there() -> None:
    """By vLLM's app, or by the server."""
    ignored = {flag for flag in APP | PORT.keys() if not readers()[PORT.get(flag, dest_of(flag))]}

    assert ignored == {"--tool-parser-plugin"}  # imported by the checks themselves; tried by hand


@pytest.mark.parametrize("flag", REFUSED)
def test_what_is_refused_names_itself(flag: str, tiny_models) -> None:
    """The line names the model and the flag that was given, and says why."""
    words = actions_of("refused")[flag]
    with pytest.raises(ModelRefusedError) as caught:
        plan_model(ModelSpec("a", str(tiny_models.path("llama")), words))

    assert str(caught.value).startswith(f"model 'a' cannot be pooled: {flag} ({REFUSED[flag].replace('`', '')})")
    assert "\n" not in str(caught.value)


def test_the_default_of_a_refused_flag_is_taken(tiny_models) -> None:
    """It asks for nothing: those who write all their flags out need not remove it."""
    words = ("--pipeline-parallel-size", "1", "-dp", "1", "--worker-cls", "auto", "--api-server-count=1", "--nnodes=1")
    plan_model(ModelSpec("a", str(tiny_models.path("llama")), words))


def test_a_pool_makes_of_each_flag_what_vllm_makes_of_it(tiny_models, monkeypatch) -> None:
    """The parsed value is that of vLLM's own parser, and so is the engine's config, or the refusal."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # some values are names of models
    monkeypatch.setattr("vllm.engine.arg_utils.configure_logging_if_needed", lambda config: None)
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)  # of engines in this process; vLLM does not know it itself
    model = str(tiny_models.path("llama"))
    base = ("--max-model-len", "512", "--served-model-name", "a")
    defaults, same, refused, differ = {(): config_of(model, base)}, set(), [], []
    for flag, words in actions_of("engine", "app").items():
        beside = BESIDE.get(flag, ())
        if beside not in defaults:
            defaults[beside] = config_of(model, (*base, *beside))
        given = (*base, *beside, *(words if flag != "--model" else ()))
        theirs = config_of(model, given)
        try:
            plan = plan_model(ModelSpec("a", model, given))
            parsed = snapshot(getattr(plan.args, dest_of(flag)))
            ours: object = snapshot_of(plan.engine_config())
        except PoolError as error:
            ours = error
        if isinstance(theirs, Exception) or isinstance(ours, Exception):
            if not (isinstance(theirs, Exception) and isinstance(ours, Exception)):
                differ.append(f"{words}: {str(theirs)[:200]} but {str(ours)[:200]}")
            refused.append(flag)
            continue
        assert parsed == snapshot(getattr(vllms_parser().parse_args([model, *given]), dest_of(flag))), words
        if theirs != ours:
            differ.append(f"{words}: another config")
        if theirs == defaults[beside] and flag in ENGINE - {"--model"}:
            same.add(flag)

    assert differ == []
    # vLLM's CPU platform keeps states in float32 where it has kernels for bfloat16, whatever is asked for.
    here = {"--mamba-ssm-cache-dtype"} if torch.cpu._is_avx512_bf16_supported() else set()
    assert SAME_CONFIG | here == same - TRIED_BY_HAND.keys()
    assert len(refused) < 30


def config_of(model: str, words: tuple[str, ...]) -> object:
    """What vLLM alone makes of the flags: a snapshot of its config, or what it raises."""
    try:
        args = copy.deepcopy(vllms_parser().parse_args([model, *words]))  # vLLM writes into the parser's defaults
        args.model = model
        validate_parsed_serve_args(args)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        propagate_flash_late_interaction(args, engine_args)
        return snapshot_of(engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER))
    except (Exception, SystemExit) as error:
        return error if isinstance(error, Exception) else ValueError("the parser leaves")


def snapshot_of(config: object) -> object:
    config.instance_id = ""  # type: ignore[attr-defined]  # a name that vLLM gives to each
    config.parallel_config._api_process_count = 1  # type: ignore[attr-defined]  # a pool's engines keep no images
    return snapshot(config)


def test_what_is_tried_by_hand_is_tried() -> None:
    """The file that is named uses the flag."""
    found = {path.name: path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert [flag for flag, file in TRIED_BY_HAND.items() if flag not in found[file]] == []


def test_the_documentation_has_the_table() -> None:
    """docs/flags.md tells of each flag that does not go where it goes in vLLM, in the words of the refusal."""
    text, _, _ = (Path(__file__).parents[3] / "docs" / "flags.md").read_text().partition("\n## What is looked for")
    rows = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*?) \|$", text, re.MULTILINE))

    assert rows == REFUSED | TAKEN_OVER
    assert {flag for flag in PORT if f"`{flag}`" not in text} == set()
