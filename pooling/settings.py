# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that tokenpool reads or sets, its own and others'. No other module touches one.

docs/configuration.md has the table. A variable is read when it is asked for. Imports nothing of ours but errors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tokenpool.errors import ConfigError, config_errors_under, show

_T = TypeVar("_T")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Variable(Generic[_T]):
    """An environment variable."""

    name: str
    parse: Callable[[str], _T]
    """Makes the value of the text; raises ConfigError."""
    readers: str
    """The commands that it changes, for the table of the docs; empty = the pool sets it for itself."""
    text: str
    """What it does."""
    is_secret: bool = False
    """Whether engine hosts, in which the code of models runs, do not get it."""

    def get(self) -> _T | None:
        """Its value; None = it is not set. Raises ConfigError with its name."""
        text = os.environ.get(self.name)
        with config_errors_under(self.name):
            return None if text is None else self.parse(text)

    def take(self) -> _T | None:
        """As `get`; later readers and children find it no more."""
        value = self.get()
        os.environ.pop(self.name, None)
        return value

    def set(self, text: str) -> None:
        """Put it into the environment of this process, its children, and libraries that are imported later."""
        os.environ[self.name] = text

    def restore(self, text: str | None) -> None:
        """Put it back to what it was; None = it was not set."""
        if text is None:
            os.environ.pop(self.name, None)
        else:
            self.set(text)

    def set_default(self, text: str) -> None:
        """`set` it unless the user has."""
        os.environ.setdefault(self.name, text)


def _level(text: str) -> str:
    level = text.strip().upper()
    if level not in _LEVELS:
        raise ConfigError(f"{show(text)} is no level: give one of {', '.join(_LEVELS)}")
    return level


def _flag(text: str) -> bool:
    if not text.strip().isdecimal():
        raise ConfigError(f"{show(text)} is no number: give 0 or 1")
    return int(text) != 0


def _gib(text: str) -> int:
    if not text:
        return 0
    if not text.strip().isdecimal():
        raise ConfigError(f"{show(text)} is no whole number of GiB")
    return int(text) << 30


API_KEY = Variable("VLLM_API_KEY", str, "`serve`",
    "the pool's `api_key` in place of the pool file's, unless `--api-key` is given", is_secret=True)  # fmt: skip
VIEW_KEY = Variable("TOKENPOOL_VIEW_KEY", str, "`serve`, `top`, `trace`, `budget`",
    "`view_key`, where neither the pool file nor a flag has one", is_secret=True)  # fmt: skip
ADMIN_KEY = Variable("TOKENPOOL_ADMIN_KEY", str, "`serve`, `top`, `trace`, `budget`",
    "`admin_key`, where neither the pool file nor a flag has one", is_secret=True)  # fmt: skip
CLIENT_KEY = Variable("TOKENPOOL_API_KEY", str, "`bench serve`",
    "the key of requests, where no `--key` is given", is_secret=True)  # fmt: skip
URL = Variable("TOKENPOOL_URL", str, "`top`, `trace`, `budget`, `bench serve`",
    "the server, where no `--url` is given; else `http://127.0.0.1:8000`")  # fmt: skip
LOG_LEVEL = Variable("TOKENPOOL_LOG_LEVEL", _level, "all", "level of tokenpool's own log lines; default `INFO`")
CPU_KV_BYTES = Variable("VLLM_CPU_KVCACHE_SPACE", _gib, "`serve`",
    "GiB of KV of all models together, with `device_memory: auto` on CPUs ([flags.md](flags.md))")  # fmt: skip
DEV_MODE = Variable("VLLM_SERVER_DEV_MODE", _flag, "`serve`",
    "vLLM's own: 1 = its [routes for development](operations.md#vllms-routes-for-development) are there")  # fmt: skip
RAY_AUTH_MODE = Variable("RAY_AUTH_MODE", str, "`serve --cluster`",
    "Ray's own: whether it asks for a token ([cluster.md](cluster.md))", is_secret=True)  # fmt: skip
RAY_AUTH_TOKEN = Variable("RAY_AUTH_TOKEN", str, "`serve --cluster`",
    "Ray's own: the token of the cluster", is_secret=True)  # fmt: skip
RAY_AUTH_TOKEN_PATH = Variable("RAY_AUTH_TOKEN_PATH", str, "`serve --cluster`",
    "Ray's own: the file that holds the token", is_secret=True)  # fmt: skip
RAY_RECONNECT = Variable("RAY_gcs_rpc_server_reconnect_timeout_s", str, "`serve --cluster`",
    "Ray's own: seconds for which a process of Ray goes on while Ray's head is away. A server takes a week where it is "
    "not set; nodes that are started without it take Ray's 60 ([failure.md](failure.md#rays-head))")  # fmt: skip
RAY_EVENTS = Variable("RAY_SCHEDULER_EVENTS", str, "`serve --cluster`, `down`",
    "Ray's own: 1 = what Ray's autoscaler does is printed between our words; 0 where it is not set")  # fmt: skip
NO_COLOR = Variable("NO_COLOR", str, "`top`", "turns colours off")
CONTROL_KEY = Variable("TOKENPOOL_CONTROL_KEY", bytes.fromhex, "engine hosts",
    "set by the server; setting it does nothing")  # fmt: skip
METRICS_FOLDER = Variable("PROMETHEUS_MULTIPROC_DIR", str, "", "where the processes of a pool put their metrics")
LIVE_ON = Variable("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", str, "", "keeps the server when an engine dies: it starts again")
BREAKABLE_GRAPHS = Variable("VLLM_USE_BREAKABLE_CUDAGRAPH", str, "",
    "vLLM's own, which it sets itself for some architectures: each model of a pool has its own value")  # fmt: skip
FLASHINFER_REDUCE = Variable("VLLM_ALLREDUCE_USE_FLASHINFER", _flag, "",
    "all-reduces of FlashInfer, with one workspace per process, of the size of its first model")  # fmt: skip
FLASHINFER_PCIE_REDUCE = Variable("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", _flag, "",
    "the same without NVLink, for one stream of one engine")  # fmt: skip
SYMMETRIC_REDUCE = Variable("VLLM_ALLREDUCE_USE_SYMM_MEM", _flag, "", "all-reduces in symmetric memory of torch")
SYMMETRIC_NCCL = Variable("VLLM_USE_NCCL_SYMM_MEM", _flag, "",
    "symmetric memory of NCCL, which swaps the memory pool of a graph that is captured for its own")  # fmt: skip
NCCL_GRAPHS = Variable("NCCL_GRAPH_REGISTER", _flag, "", "that NCCL registers the memory of CUDA graphs")
OFF_IN_GROUPS = (FLASHINFER_REDUCE, FLASHINFER_PCIE_REDUCE, SYMMETRIC_REDUCE, SYMMETRIC_NCCL, NCCL_GRAPHS)
"""Ways to reduce among ranks that a process has once, and that were not tried with several engines in it: 0 for the
ranks of a tensor parallel group."""
ALLOCATOR = Variable("PYTORCH_CUDA_ALLOC_CONF", str, "", "torch's own: how it divides the memory of a GPU")
REDIRECTS = Variable("VLLM_MEDIA_URL_ALLOW_REDIRECTS", str, "", "whether vLLM follows redirects of media")
MAX_IMAGE_PIXELS = Variable("VLLM_MAX_IMAGE_PIXELS", str, "",
    "vLLM's own: the most pixels of an image ([security.md](security.md#what-a-request-may-do))")  # fmt: skip
VARIABLES: Sequence[Variable[Any]] = [each for each in [*globals().values()] if isinstance(each, Variable)]

SECRETS = {variable.name for variable in VARIABLES if variable.is_secret}
"""The names of those that no engine host gets. All that a key of the pool file refers to are added."""


def environment() -> dict[str, str]:
    """A copy of the whole environment, for a child, or for a variable that the user names."""
    return dict(os.environ)


def environment_of_hosts() -> dict[str, str]:
    """The environment for an engine host."""
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


def extend_environment(given: Mapping[str, str]) -> None:
    """Put variables into the environment of this process and its children."""
    os.environ.update(given)
