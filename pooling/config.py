# SPDX-License-Identifier: Apache-2.0
"""The pool file: every setting of a pool as frozen values, checked once at the edge.

    models:
      - name: chat
        model: Qwen/Qwen3-4B
        args: {max_model_len: 8192}     # or a list, or one string, of vLLM's command-line flags
        slo: {ttft: 10s, tpot: 100ms}
        admission: {on_miss: reject}
      - name: code
        model: ./checkpoints/code       # relative to the pool file
    device_memory: 60GiB
    admin_key: ${POOL_ADMIN_KEY}

Every refusal is a ConfigError of one line that names the key and the fix. Imports neither vllm nor ray.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import yaml

from tokenpool import units
from tokenpool.access_config import check_access, is_path, parse_keys, parse_roots
from tokenpool.cluster_config import CLUSTER_PARSERS, ClusterConfig, check_replicas
from tokenpool.engine_flags import parse_flags
from tokenpool.errors import ConfigError, check_setting, config_errors_under, show
from tokenpool.tenant_config import TENANT_PARSERS, TenantConfig, check_tenants, parse_tenants

_NAME = re.compile(r"(?!(.*/)?\.{0,2}(/|\Z))[A-Za-z0-9._:/-]+")  # no part is empty, "." or "..": clients drop those
_UNIT_SUFFIX = re.compile(r"_(s|bytes)$")

WEIGHTS = ("auto", "movable", "fixed")
ON_MISS = ("queue", "reject")

_T = TypeVar("_T")
_Parsers = Mapping[str, Callable[[Any], Any]]


@dataclass(frozen=True, slots=True)
class SLO:
    """When tokens are due: token i of a request at arrival + ttft + i * tpot."""

    ttft_s: float
    """Time to the first token in seconds, above 0. YAML: `ttft: 10s`."""
    tpot_s: float
    """Time per further token in seconds, above 0. YAML: `tpot: 100ms`."""

    def __post_init__(self) -> None:
        check_setting(self.ttft_s > 0, "ttft", "must be above 0, such as 10s")
        check_setting(self.tpot_s > 0, "tpot", "must be above 0, such as 100ms")


@dataclass(frozen=True, slots=True)
class Admission:
    """Which new requests of a model are taken in."""

    max_waiting: int | None = 1024
    """Requests that may wait for their first token; 1024 is some minutes of work for a model. YAML null = no bound."""
    max_waiting_tokens: int | None = None
    """Prompt tokens that may wait; None = no bound."""
    on_miss: str = "queue"
    """What becomes of a request whose first token is predicted to come after its due time: `queue` = it waits,
    `reject` = 503 at once. As the pool's setting it means nothing for models without an `slo`."""

    def __post_init__(self) -> None:
        for key, value in (("max_waiting", self.max_waiting), ("max_waiting_tokens", self.max_waiting_tokens)):
            check_setting(value is None or value >= 1, key, "must be 1 or more, or null for no bound")
        problem = f"must be one of {', '.join(ON_MISS)}, got {show(self.on_miss)}"
        check_setting(self.on_miss in ON_MISS, "on_miss", problem)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the pool."""

    name: str
    """What clients send as `model`: letters, digits and . _ : / - only, as in URLs."""
    model: str
    """Hugging Face id or absolute path; in the pool file also ./x and ../x (from its folder) and ~/x."""
    args: tuple[str, ...] = ()
    """Flags for this model's engine, split as on vLLM's command line; vLLM judges them at engine start."""
    slo: SLO | None = None
    """When its tokens are due; None = no due times, the model is served as turns allow."""
    priority: int = 0
    """Larger is more important to a turn policy that looks at it; 0 = all models are equal."""
    admission: tuple[tuple[str, Any], ...] = ()
    """Settings of the pool's `admission` that differ for this model. YAML: `admission: {max_waiting: 8}`."""
    replicas: int | None = None
    """Hosts of a cluster that serve it, at least; None = as `cluster.replicas` says."""
    max_replicas: int | None = None
    """Hosts of a cluster that may serve it, at most; None = as `cluster.max_replicas` says."""

    def __post_init__(self) -> None:
        problem = f"{show(self.name)} is no model name: use letters, digits and . _ : / - only, no part empty, . or .."
        name = self.name.strip("./") if self.name == self.model else self.name  # on a command line a path is its name
        check_setting(_NAME.fullmatch(name) is not None, "name", problem)
        needs_slo = dict(self.admission).get("on_miss") == "reject"
        problem = "reject needs to know when tokens are due: give the model an slo"
        check_setting(self.slo is not None or not needs_slo, "admission.on_miss", problem)


@dataclass(frozen=True, slots=True)
class Scheduling:
    """How the models of one device take turns."""

    policy: str = "auto"
    """Name of an entry point in the group `tokenpool.turn_policies`; auto = slack where weights are movable, because
    round_robin would switch for every token, else round_robin."""
    options: tuple[tuple[str, float], ...] = ()
    """The policy's options by name; the policy judges them. YAML: `options: {max_turn_s: 0.5}`."""


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The whole pool file. Change a copy with `dataclasses.replace`; that checks the ranges again."""

    models: tuple[ModelSpec, ...]
    """The models, at least one, each name once; the order is that of `/v1/models`."""
    device_memory: int | None = None
    """Bytes of device memory the pool may use; None (YAML: auto) = found out when the host starts."""
    host_memory: int | None = None
    """Bytes of host memory the pool may use; None (YAML: auto) = found out when the host starts."""
    weights: str = "auto"
    """Whether weights may leave the device while their model rests: `movable`, `fixed`, or `auto` = movable if the
    weights of all models do not fit together."""
    page_size: int = 32 << 20
    """Bytes of the unit in which memory moves between models: a power of two, 64 KiB or more. 32 MiB holds a
    KV block of most models and keeps map calls few; small CPU pools want less."""
    kv_floor_pages: int = 1
    """Pages of KV promised to each model, at least 1: with less, a busy neighbour could starve it."""
    host: str | None = None
    """Address to listen on; None = all interfaces. `${NAME}` is replaced from the environment."""
    port: int = 8000
    """TCP port to listen on; 0 = any free one. 8000 is vLLM's default."""
    frontends: int = 1
    """Processes that answer on the port, 1 to 64; more than one when HTTP and tokenizing fill a core."""
    api_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys that clients must send, any of them; empty = no key is asked for. `${NAME}` as in `host`."""
    admin_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys for all of the pool API; empty = nothing is changed over HTTP. `${NAME}` as in `host`."""
    view_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys for looking at the pool: GET below `/v1/pool/`, the status page, `top`, `trace`. `${NAME}` as in `host`."""
    admin_models: str = "listed"
    """Models that an `admin_key` may add: `none`, `any`, or `listed` = below `admin_roots`, with harmless flags."""
    admin_roots: tuple[str, ...] | None = None
    """Folders, and owners on the hub, of models that may be added; None = those of the models of the pool file."""
    metrics_key: tuple[str, ...] = field(default=(), repr=False)
    """Keys for `/metrics` and `/load` alone, such as Prometheus'. `${NAME}` as in `host`."""
    cpu_link: int | None = None
    """Bytes per second at which weights and KV move to and from the CPU device, to try policies with the copy times
    of another machine; None = as fast as memory is."""
    scheduling: Scheduling = Scheduling()
    """How the models take turns."""
    admission: Admission = Admission()
    """Which new requests are taken in, of each model alone; a model's own `admission` overrides it."""
    cluster: ClusterConfig = ClusterConfig()
    """How the pool is spread over a Ray cluster; means nothing without `--cluster`."""
    tenants: tuple[TenantConfig, ...] = ()
    """Who may use the pool and how much; empty = whoever has an `api_key`, without limits."""
    share_cache: bool = False
    """Whether tenants share each model's prefix cache; if not, none can tell by the time what others have sent."""
    host_timeout_s: float = 120.0
    """Without a pulse, or in one step, copy or call for so long, an engine host is killed and started again; 1 s or
    more, and more than a step of the longest prompt takes. YAML: `host_timeout: 120s`."""
    load_timeout_s: float = 1800.0
    """The same for loading, from one sign of progress to the next: `warming up` of a large model shows none for
    minutes. YAML: `load_timeout: 30m`."""
    shutdown_timeout_s: float = 60.0
    """Longest wait for running requests after SIGTERM; 60 covers most. YAML: `shutdown_timeout: 60s`."""
    max_request_bytes: int = 32 << 20
    """Largest request body; 32 MiB leaves room for images and audio. YAML: `max_request: 32MiB`."""

    def __post_init__(self) -> None:
        check_setting(len(self.models) > 0, "models", "is empty: list at least one model with name and model")
        seen: dict[str, int] = {}
        for i, model in enumerate(self.models):
            first = seen.setdefault(model.name, i)
            problem = f"{model.name!r} is the name of models[{first}] already: give each model its own"
            check_setting(first == i, f"models[{i}].name", problem)
        size = self.page_size
        problem = f"{size} bytes is no power of two of 64KiB or more: write such as 32MiB"
        check_setting(size >= 64 << 10 and size & (size - 1) == 0, "page_size", problem)
        check_setting(self.kv_floor_pages >= 1, "kv_floor_pages", "must be 1 or more")
        if self.device_memory is not None:
            pages, floors = self.device_memory // size, self.kv_floor_pages * len(self.models)
            problem = f"{units.format_bytes(self.device_memory)} is {pages} pages, the models need "
            problem += f"{show(floors)}: raise it, or lower page_size or kv_floor_pages"
            check_setting(pages >= floors, "device_memory", problem)
        problem = f"must be one of {', '.join(WEIGHTS)}, got {show(self.weights)}"
        check_setting(self.weights in WEIGHTS, "weights", problem)
        check_setting(self.cpu_link is None or self.cpu_link > 0, "cpu_link", "must be above 0, such as 1GiB")
        check_setting(self.host_memory != 0, "host_memory", "is 0: give a size such as 64GiB, or auto")
        check_setting(self.host is None or self.host.split() == [self.host], "host", "must be one address")
        check_setting(0 <= self.port <= 65535, "port", f"{show(self.port)} is out of range: give 0 to 65535")
        problem = f"{show(self.frontends)} is out of range: give 1 to 64 processes"
        check_setting(1 <= self.frontends <= 64, "frontends", problem)
        keys = {setting: getattr(self, setting) for setting in ("api_key", "admin_key", "view_key", "metrics_key")}
        check_access(keys, self.admin_models, self.admin_roots)
        problem = "guards nothing: everybody may use the pool; add api_key or tenants, or remove it"
        check_setting(not self.metrics_key or bool(self.api_key or self.tenants), "metrics_key", problem)
        check_setting(self.host_timeout_s >= 1, "host_timeout", "must be 1s or more, such as 120s")
        check_setting(self.load_timeout_s >= 1, "load_timeout", "must be 1s or more, such as 30m")
        check_setting(self.shutdown_timeout_s >= 0, "shutdown_timeout", "must be 0s or more")
        check_setting(self.max_request_bytes > 0, "max_request", "must be above 0, such as 32MiB")
        check_tenants(self.tenants, seen, sum(keys.values(), ()))
        check_replicas(self.cluster, self.models)

    def admission_of(self, spec: ModelSpec) -> Admission:
        """The pool's admission settings with the model's own in their place."""
        return replace(self.admission, **dict(spec.admission))

    @classmethod
    def from_dict(cls, data: object, source: str = "pool.yaml") -> PoolConfig:
        """Check the parsed YAML of a pool file; errors name `source`, relative paths start at its folder."""
        folder = os.path.dirname(os.path.abspath(source))
        with config_errors_under(source=source):
            roots = partial(parse_roots, folder=folder)
            parsers = {"models": partial(_models, folder=folder), **_POOL_PARSERS, "admin_roots": roots}
            return _build(cls, data, parsers)


def load_pool_file(path: str | os.PathLike[str]) -> PoolConfig:
    """Read and check a pool file; raises ConfigError, also for a file that cannot be read."""
    source = os.fspath(path)
    with config_errors_under(source=source):
        try:
            with open(source, "rb") as file:
                data = yaml.load(file, Loader=_UniqueKeyLoader)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise ConfigError(place + ", ".join(filter(None, (error.context, error.problem)))) from None
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            # PyYAML leaks built-in errors: ValueError for 2001-99-99, KeyError for `!!bool x`.
            raise ConfigError(f"is no good YAML: {' '.join(str(error).split())}") from None
    return PoolConfig.from_dict(data, source)


class _UniqueKeyLoader(yaml.SafeLoader):
    # Plain YAML silently takes the last of two equal keys. Refused here and not in construct_mapping, where a
    # `<<` merge has already put overridden keys in twice.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                problem = f"key {show(key.value)} is written twice: remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _build(cls: type[_T], data: object, parsers: _Parsers) -> _T:
    """Make a `cls` from a mapping; the key of a field is its name without the unit suffix."""
    if not isinstance(data, dict):
        raise ConfigError(f"expected a mapping with the keys {', '.join(parsers)}, got {show(data)}")
    for key in data:
        if key not in parsers:
            near = difflib.get_close_matches(key, parsers, 1) if isinstance(key, str) else []
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(parsers)}"
            raise ConfigError(f"unknown key {show(key)}, {hint}")
    values = {}
    for spec in fields(cls):  # type: ignore[arg-type]
        key = _UNIT_SUFFIX.sub("", spec.name)
        if key in data:
            with config_errors_under(key):
                values[spec.name] = parsers[key](data[key])
        else:
            check_setting(spec.default is not MISSING, key, "is missing: add it")
    return cls(**values)


def _models(value: object, folder: str) -> tuple[ModelSpec, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"expected a list of models, each with name and model, got {show(value)}")
    parsers: _Parsers = dict(
        name=units.parse_text,
        model=partial(_model, folder=folder),
        args=parse_flags,
        slo=_slo,
        priority=units.parse_int,
        admission=_admission_changes,
        replicas=units.parse_int,
        max_replicas=units.parse_int,
    )
    specs = []
    for i, item in enumerate(value):
        with config_errors_under(f"[{i}]"):
            specs.append(_build(ModelSpec, item, parsers))
    return tuple(specs)


def _model(value: object, folder: str) -> str:
    model = units.parse_text(value)
    if not is_path(model):
        return model
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(model)))
    check_setting(os.path.exists(path), None, f"missing path {show(path)}: correct it, or give a model id")
    return path


def _slo(value: object) -> SLO | None:
    return None if value is None else _build(SLO, value, dict(ttft=units.parse_seconds, tpot=units.parse_seconds))


_ADMISSION_PARSERS: _Parsers = {
    "max_waiting": units.optional(units.parse_int),
    "max_waiting_tokens": units.optional(units.parse_int),
    "on_miss": units.parse_text,
}


def _admission(value: object) -> Admission:
    return _build(Admission, value, _ADMISSION_PARSERS)


def _admission_changes(value: object) -> tuple[tuple[str, Any], ...]:
    checked = _admission(value)
    assert isinstance(value, dict)
    return tuple((key, getattr(checked, key)) for key in value)


def _options(value: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"expected a mapping of option names to numbers, got {show(value)}")
    for key, number in value.items():
        good = isinstance(number, int | float) and not isinstance(number, bool)
        check_setting(good, key, f"expected a number, got {show(number)}")
    return tuple(value.items())


_POOL_PARSERS: _Parsers = {
    "device_memory": units.parse_bytes_or_auto,
    "host_memory": units.parse_bytes_or_auto,
    "page_size": units.parse_bytes,
    "kv_floor_pages": units.parse_int,
    "host": units.optional(lambda value: units.expand_env(units.parse_text(value))),
    "port": units.parse_int,
    "frontends": units.parse_int,
    "api_key": parse_keys,
    "admin_key": parse_keys,
    "view_key": parse_keys,
    "admin_models": units.parse_text,
    "metrics_key": parse_keys,
    "share_cache": units.parse_bool,
    "weights": units.parse_text,
    "cpu_link": lambda value: None if value is None else units.parse_bytes(value),
    "scheduling": lambda value: _build(Scheduling, value, {"policy": units.parse_text, "options": _options}),
    "admission": _admission,
    "cluster": lambda value: _build(ClusterConfig, value, CLUSTER_PARSERS),
    "tenants": lambda value: parse_tenants(value, lambda item: _build(TenantConfig, item, TENANT_PARSERS)),
    "host_timeout": units.parse_seconds,
    "load_timeout": units.parse_seconds,
    "shutdown_timeout": units.parse_seconds,
    "max_request": units.parse_bytes,
}
