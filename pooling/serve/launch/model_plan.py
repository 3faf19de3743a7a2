# SPDX-License-Identifier: Apache-2.0
"""One model of a plan: its settings, vLLM's flags, and the engine config that they make. Loads no weights."""

from __future__ import annotations

import copy
from argparse import Namespace
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.usage.usage_lib import UsageContext

from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError, PoolError
from tokenpool.serve.launch.group_reduces import keep_reduces_apart
from tokenpool.serve.launch.media_packages import check_packages, missing_package
from tokenpool.serve.launch.plugged_formats import unknown_format
from tokenpool.serve.launch.poolability import check_config, check_media
from tokenpool.serve.launch.small_engines import keep_engine_small
from tokenpool.settings import BREAKABLE_GRAPHS
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.spec import HostedModelSpec


@dataclass(slots=True)
class ModelPlan:
    """One model that can be pooled."""

    spec: ModelSpec
    args: Namespace
    """vLLM's parsed serve flags; its app is built from them."""
    weight_bytes: int
    """Size of a local checkpoint's weights and its drafter's, of each rank its share; 0 for what is no local folder.
    """
    checked: VllmConfig | None = None
    """The engine config that was checked, to be read and not changed; None for a model added at run time."""
    for_tenants: bool = False
    """Whether tenants use it, who are not to have any address fetched from here."""

    @property
    def num_ranks(self) -> int:
        """Ranks that the model runs on."""
        return self.args.tensor_parallel_size

    def engine_config(self) -> VllmConfig:
        """A fresh engine config, which an engine may change; raises ConfigError of one line.

        It shares no object with the flags or with another config. What vLLM makes of the flags here stays in them:
        its frontend reads the reasoning parser there. Its engine keeps no images: they come in full each time.
        """
        try:
            engine_args = AsyncEngineArgs.from_cli_args(self.args)
            engine_args.speculative_config = copy.deepcopy(engine_args.speculative_config)  # vLLM writes into it
            propagate_flash_late_interaction(self.args, engine_args)
            fit_for_pool(self.spec.name, engine_args)
            config = _config_of(engine_args)
        except PoolError:
            raise
        except Exception as error:  # vLLM raises many kinds for a bad model or flag; all mean "does not start"
            if refusal := unknown_format(self.spec.name, error):
                raise refusal from error
            raise ConfigError(missing_package(error) or first_line(error), key=f"model {self.spec.name!r}") from error
        check_config(self.spec.name, config)
        check_packages(self.spec.name, config.model_config)
        if self.for_tenants:
            check_media(self.spec.name, config.model_config)
        # vLLM sends an image once and then its hash only, which an engine that comes later does not know. It sends the
        # image each time where several frontends share an engine; this is how client and engine know that.
        config.parallel_config._api_process_count = 2
        return copy.deepcopy(config)

    def for_host(
        self, config: VllmConfig, addresses: EngineAddresses | None = None, *, log_stats: bool | None = None
    ) -> HostedModelSpec:
        """What a host is told of the model; `log_stats` is by its flags if not given."""
        return HostedModelSpec(
            name=self.spec.name,
            vllm_config=config,
            addresses=addresses,
            slo=self.spec.slo,
            priority=self.spec.priority,
            weight_bytes=self.weight_bytes,
            keep=self.spec.keep,
            log_stats=not self.args.disable_log_stats if log_stats is None else log_stats,
        )


def fit_for_pool(name: str, engine_args: EngineArgs) -> None:
    """Change what engines of one process cannot share where the user gave nothing; raises ModelRefusedError."""
    keep_engine_small(engine_args)
    keep_reduces_apart(name, engine_args)


def _config_of(engine_args: AsyncEngineArgs) -> VllmConfig:
    """vLLM sets a variable of the process for some architectures: other models must not find it."""
    before = BREAKABLE_GRAPHS.get()
    try:
        return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    finally:
        BREAKABLE_GRAPHS.restore(before)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Pydantic's first line only counts the errors; the third says what is wrong.
    if lines and "validation error" in lines[0] and len(lines) > 1:
        lines = lines[-2:] if lines[-1].startswith("For further") else lines[1:]
    return lines[0] if lines else type(error).__name__
