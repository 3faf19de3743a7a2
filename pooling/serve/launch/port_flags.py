# SPDX-License-Identifier: Apache-2.0
"""Flags of `vllm serve` that are of the port, or of whole processes: the models of a pool have them in common."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.config.logging import LoggingConfig

from tokenpool.errors import ConfigError
from tokenpool.serve.launch.flag_table import PORT
from tokenpool.serve.launch.flags import parse_serve_flags, spell_out

if TYPE_CHECKING:
    from tokenpool.serve.launch.model_plan import ModelPlan


def settle_logging(args: Namespace) -> None:
    """Put what the three logging flags say into `logging_config`, from where vLLM's processes take it."""
    config = getattr(args, "logging_config", None)
    given = {"log_level": "log_level", "log_config_file": "pylogging_config_file"}
    changes = {field: value for dest, field in given.items() if (value := vars(args).pop(dest, None)) is not None}
    args.logging_config = replace(config or LoggingConfig(), **changes) if changes else config


def share_port_flags(plan: ModelPlan, first: ModelPlan) -> None:
    """Give a model the first one's flags of the port; raises ConfigError if it has others of its own.

    So it does not matter whose are read, and which model's engine was configured last.
    """
    defaults = parse_serve_flags([])
    for flag, dest in PORT.items():
        own, common = getattr(plan.args, dest, None), getattr(first.args, dest, None)
        if own == common:
            continue
        if own != getattr(defaults, dest, None):
            words = [word.partition("=")[0].partition(".")[0] for word in spell_out(plan.spec.args)]
            named = next((name for name in PORT if PORT[name] == dest and name in words), flag)
            problem = f"is a flag of the whole port, and model {first.spec.name!r} has another value: write it there"
            raise ConfigError(problem, key=named, source=f"model {plan.spec.name!r}")
        setattr(plan.args, dest, copy.deepcopy(common))
