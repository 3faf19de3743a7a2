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

import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import yaml

from tokenpool import units
from tokenpool.access_config import Keys, Roots, check_access, is_path
from tokenpool.cluster_config import ClusterConfig, check_replicas
from tokenpool.engine_flags import FLAGS
from tokenpool.errors import ConfigError, check_setting, config_errors_under, show
from tokenpool.group_config import Labels, check_groups
from tokenpool.host_kinds import check_kinds
from tokenpool.sections import (
    Bytes,
    BytesOrAuto,
    ChangesOf,
    Count,
    ExpandedText,
    Rule,
    Seconds,
    Section,
    Switch,
    Text,
    Written,
    above,
    at_least,
    between,
    filled,
    list_of,
    one_of,
    read_section,
)
from tokenpool.tenant_config import TenantConfig, check_tenants
from tokenpool.yaml_loader import SafeLoader

_NAME = re.compile(r"(?!(.*/)?\.{0,2}(/|\Z))[A-Za-z0-9._:/-]+")  # no part is empty, "." or "..": clients drop those
_STORE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_StoreName = Annotated[
    Text,
    Rule(
        lambda name: _STORE.fullmatch(name) is not None,
        "{} is no name of a store: write private, node, or another word of a-z, 0-9 and -",
        {"pattern": f"^{_STORE.pattern}$"},
    ),
]
_Bound = Annotated[Count, at_least(1, "must be 1 or more, or null for no bound")]

DEFAULT_PAGE_SIZE = 32 << 20


def _read_model(value: object, folder: str) -> str:
    model = units.parse_text(value)
    if not is_path(model):
        return model
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(model)))
    check_setting(os.path.exists(path), None, f"missing path {show(path)}: correct it, or give a model id")
    return path


def _read_options(value: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"expected a mapping of option names to numbers, got {show(value)}")
    for key, number in value.items():
        units.parse_number(number, key)
    return tuple(value.items())


@dataclass(frozen=True, slots=True)
class SLO(Section):
    """When tokens are due: token i of a request at arrival + ttft + i * tpot."""

    ttft_s: Annotated[Seconds, above(0, "must be above 0, such as 10s")]
    """Time to the first token, above 0, such as `10s`."""
    tpot_s: Annotated[Seconds, above(0, "must be above 0, such as 100ms")]
    """Time per further token, above 0, such as `100ms`."""


@dataclass(frozen=True, slots=True)
class Admission(Section):
    """Which new requests of a model are taken in."""

    max_waiting: _Bound | None = 1024
    """Requests that may wait for their first token; 1024 is some minutes of work for a model. `null` = no bound."""
    max_waiting_tokens: _Bound | None = None
    """Prompt tokens that may wait; none = no bound."""
    on_miss: Annotated[Text, one_of("queue", "reject")] = "queue"
    """What becomes of a request whose first token is predicted to come after its due time: `queue` = it waits,
    `reject` = 503 at once. As the pool's setting it means nothing for models without an `slo`."""


@dataclass(frozen=True, slots=True)
class ModelSpec(Section):
    """One model of the pool."""

    name: Annotated[str, Written(units.parse_text, "text", {"type": "string", "pattern": "^[A-Za-z0-9._:/-]+$"})]
    """What clients send as `model`: letters, digits and . _ : / - only, as in URLs."""
    model: Annotated[str, Written(_read_model, "text", {"type": "string", "minLength": 1}, in_folder=True)]
    """Hugging Face id or absolute path; in the pool file also ./x and ../x (from its folder) and ~/x."""
    args: Annotated[tuple[str, ...], FLAGS] = ()
    """Flags for this model's engine, split as on vLLM's command line; vLLM judges them at engine start."""
    slo: SLO | None = None
    """When its tokens are due; none = no due times, the model is served as turns allow."""
    priority: Count = 0
    """Larger is more important to a turn policy that looks at it; 0 = all models are equal."""
    admission: Annotated[tuple[tuple[str, Any], ...], ChangesOf(Admission)] = ()
    """Settings of the pool's `admission` that differ for this model, such as `{max_waiting: 8}`."""
    load: Annotated[Text, one_of("auto", "start", "on_demand")] | None = None
    """When it is built: with the pool's `start`, or `on_demand`, by its first request, which waits for that; `auto` =
    `start`. None = as the pool's `load` says."""
    unload_after_s: Annotated[Seconds, above(0, "must be above 0, such as 10m")] | None = None
    """Without a request for so long, nothing of it stays built, and the next request has it loaded again; none = as
    the pool's `unload_after` says."""
    keep: Annotated[Text, one_of("device", "host")] | None = None
    """What never leaves once it is loaded: its weights on the `device`, or their copy in memory of the `host`. The
    model is never unloaded then. None = it comes and goes."""
    load_timeout_s: Annotated[Seconds, at_least(1, "must be 1s or more, such as 30m")] | None = None
    """Longest wait of a request until the model is loaded, 1 s or more; none = the pool's `load_timeout`."""
    replicas: Annotated[Count, at_least(1)] | None = None
    """Hosts of a cluster that serve it, at least; none = as `cluster.replicas` says."""
    max_replicas: Annotated[Count, at_least(1)] | None = None
    """Hosts of a cluster that may serve it, at most; none = as `cluster.max_replicas` says."""
    hosts: Labels = ()
    """Labels of the hosts of a cluster that it may be on: one of these, and none that begins with `!`. A label is that
    of a Ray node (`gpu` or `gpu=h100`), the name of a host or the address of its node; none = any host. Where hosts
    come and go only labels such as `gpu=h100` may be given: Ray is asked for a node with one of them."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        problem = f"{show(self.name)} is no model name: use letters, digits and . _ : / - only, no part empty, . or .."
        name = self.name.strip("./") if self.name == self.model else self.name  # on a command line a path is its name
        check_setting(_NAME.fullmatch(name) is not None, "name", problem)
        needs_slo = dict(self.admission).get("on_miss") == "reject"
        problem = "reject needs to know when tokens are due: give the model an slo"
        check_setting(self.slo is not None or not needs_slo, "admission.on_miss", problem)


class Loading(NamedTuple):
    """When a model is loaded and unloaded, the pool's settings included."""

    at_start: bool
    """With the pool, not by its first request."""
    unload_after_s: float
    """Seconds without a request; inf = never."""
    keep: str | None
    """`device` or `host`: what never leaves."""
    timeout_s: float
    """How long a request waits for it."""


@dataclass(frozen=True, slots=True)
class Scheduling(Section):
    """How the models of one device take turns."""

    policy: Text = "auto"
    """Name of an entry point in the group `tokenpool.turn_policies`; auto = slack where weights are movable, because
    round_robin would switch for every token, else round_robin."""
    options: Annotated[
        tuple[tuple[str, float], ...],
        Written(_read_options, "mapping", {"type": "object", "additionalProperties": {"type": "number"}}),
    ] = ()
    """The policy's options by name, such as `{max_turn_s: 0.5}`; the policy judges them."""


@dataclass(frozen=True, slots=True)
class PoolConfig(Section):
    """The whole pool file. Change a copy with `dataclasses.replace`; that checks the ranges again."""

    models: Annotated[
        tuple[ModelSpec, ...],
        list_of("models, each with name and model"),
        filled("is empty: list at least one model with name and model"),
    ]
    """The models, at least one, each name once; the order is that of `/v1/models`."""
    device_memory: BytesOrAuto = None
    """Device memory the pool may use; auto = found out when the host starts."""
    host_memory: Annotated[BytesOrAuto, above(0, "is 0: give a size such as 64GiB, or auto")] = None
    """Host memory the pool may use; auto = found out when the host starts."""
    host_store: _StoreName = "private"
    """Where copies of movable weights in host memory lie: `private` = each engine host has its own; else the name of a
    store, such as `node`: all hosts of this machine and user that name it have one copy of each model together, which
    outlives them. `host_memory` is then the budget of all of them."""
    weights: Annotated[Text, one_of("auto", "movable", "fixed")] = "auto"
    """Whether weights may leave the device while their model rests: `movable`, `fixed`, or `auto` = movable if the
    weights of all models do not fit together."""
    page_size: Annotated[
        Bytes,
        Rule(
            lambda size: size >= 64 << 10 and size & (size - 1) == 0,
            "{} bytes is no power of two of 64KiB or more: write such as 32MiB", {"minimum": 64 << 10},
        ),
    ] = DEFAULT_PAGE_SIZE  # fmt: skip
    """Unit in which memory moves between models: a power of two, 64 KiB or more. 32 MiB holds a KV block of most models
    and keeps map calls few; small CPU pools want less."""
    kv_floor_pages: Annotated[Count, at_least(1)] = 1
    """Pages of KV promised to each model, at least 1: with less, a busy neighbour could starve it."""
    host: Annotated[ExpandedText, Rule(lambda host: host.split() == [host], "must be one address", {})] | None = None
    """Address to listen on; none = all interfaces."""
    port: Annotated[Count, between(0, 65535)] = 8000
    """TCP port to listen on; 0 = any free one. 8000 is vLLM's default."""
    frontends: Annotated[Count, between(1, 64, "{} is out of range: give 1 to 64 processes")] = 1
    """Processes that answer on the port, 1 to 64; more than one when HTTP and tokenizing fill a core."""
    api_key: Keys = field(default=(), repr=False)
    """Keys that clients must send, any of them; none = no key is asked for."""
    admin_key: Keys = field(default=(), repr=False)
    """Keys for all of the pool API; none = nothing is changed over HTTP."""
    view_key: Keys = field(default=(), repr=False)
    """Keys for looking at the pool: GET below `/v1/pool/`, the status page, `top`, `trace`."""
    admin_models: Annotated[Text, one_of("none", "listed", "any")] = "listed"
    """Models that an `admin_key` may add: `none`, `any`, or `listed` = below `admin_roots`, with harmless flags."""
    admin_roots: (
        Annotated[Roots, filled("is empty: list folders or owners, remove it, or write admin_models: none")] | None
    ) = None
    """Folders, and owners on the hub, of models that may be added; none = those of the models of the pool file."""
    metrics_key: Keys = field(default=(), repr=False)
    """Keys for `/metrics` and `/load` alone, such as Prometheus'."""
    open_picker_metrics: Switch = False
    """Whether `/metrics/picker` answers without a key: an endpoint picker of the Gateway API has none. It tells names
    of models, how many requests wait and run, and how full the KV is."""
    cpu_link: Annotated[Bytes, above(0, "must be above 0, such as 1GiB")] | None = None
    """What weights and KV move to and from the CPU device per second, to try policies with the copy times of another
    machine; none = as fast as memory is."""
    scheduling: Scheduling = Scheduling()
    """How the models take turns."""
    admission: Admission = Admission()
    """Which new requests are taken in, of each model alone; a model's own `admission` overrides it."""
    cluster: ClusterConfig = ClusterConfig()
    """How the pool is spread over a Ray cluster; means nothing without `--cluster`."""
    tenants: Annotated[tuple[TenantConfig, ...], list_of("tenants, each with name and keys")] = ()
    """Who may use the pool and how much; none = whoever has an `api_key`, without limits."""
    share_cache: Switch = False
    """Whether tenants share each model's prefix cache; if not, none can tell by the time what others have sent."""
    host_timeout_s: Annotated[Seconds, at_least(1, "must be 1s or more, such as 120s")] = 120.0
    """Without a pulse, or in one step, copy or call for so long, an engine host is killed and started again; 1 s or
    more, and more than a step of the longest prompt takes."""
    load_timeout_s: Annotated[Seconds, at_least(1, "must be 1s or more, such as 30m")] = 1800.0
    """The same for loading, from one sign of progress to the next: `warming up` of a large model shows none for
    minutes. Requests wait as long for a model that is loaded, unless it says otherwise."""
    load: Annotated[Text, one_of("auto", "start", "on_demand")] = "auto"
    """When models are built that do not say so themselves: `start`, `on_demand`, or `auto` = `start`."""
    unload_after_s: Annotated[Seconds, above(0, "must be above 0, such as 10m")] | None = None
    """Without a request for so long, a model is unloaded that says nothing else; none = it stays."""
    max_loaded: Annotated[Count, at_least(1)] | None = None
    """Models that are loaded at a time; for one more, the one is unloaded that has been idle longest. None = all."""
    host_template: Switch = True
    """Whether engine hosts are forked from a process that has imported vLLM and is kept for that: one that died is back
    without the seconds of the imports."""
    shutdown_timeout_s: Annotated[Seconds, at_least(0, "must be 0s or more")] = 60.0
    """Longest wait for running requests after SIGTERM; 60s covers most."""
    max_request_bytes: Annotated[Bytes, above(0, "must be above 0, such as 32MiB")] = 32 << 20
    """Largest request body; 32 MiB leaves room for images and audio."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        seen: dict[str, int] = {}
        for i, model in enumerate(self.models):
            first = seen.setdefault(model.name, i)
            problem = f"{model.name!r} is the name of models[{first}] already: give each model its own"
            check_setting(first == i, f"models[{i}].name", problem)
        if self.device_memory is not None:
            most = min(self.max_loaded or len(self.models), len(self.models))
            pages, floors = self.device_memory // self.page_size, self.kv_floor_pages * most
            problem = f"{units.format_bytes(self.device_memory)} is {pages} pages, the models need "
            problem += f"{show(floors)}: raise it, or lower page_size or kv_floor_pages"
            problem += (
                ", or max_loaded" if most > 1 and any(not self.loading_of(m).at_start for m in self.models) else ""
            )
            check_setting(pages >= floors, "device_memory", problem)
        keys = {setting: getattr(self, setting) for setting in ("api_key", "admin_key", "view_key", "metrics_key")}
        check_access(keys)
        problem = "guards nothing: everybody may use the pool; add api_key or tenants, or remove it"
        check_setting(not self.metrics_key or bool(self.api_key or self.tenants), "metrics_key", problem)
        check_tenants(self.tenants, seen, sum(keys.values(), ()))
        check_replicas(self.cluster, self.models)
        check_groups(self.cluster, self.models)
        if self.cluster.host_range is not None:
            check_kinds(self.models)
        staying = sum(rule.at_start or rule.keep is not None for rule in map(self.loading_of, self.models))
        problem = (
            f"is less than the {show(staying)} models that are loaded at the start, or kept: raise it, or let them "
        )
        problem += "load on_demand"
        check_setting(self.max_loaded is None or staying <= self.max_loaded, "max_loaded", problem)

    def admission_of(self, spec: ModelSpec) -> Admission:
        """The pool's admission settings with the model's own in their place."""
        return replace(self.admission, **dict(spec.admission))

    def loading_of(self, spec: ModelSpec) -> Loading:
        """When a model is loaded and unloaded."""
        unload_after_s = spec.unload_after_s or self.unload_after_s or math.inf
        return Loading(
            at_start=(spec.load or self.load) != "on_demand",
            unload_after_s=math.inf if spec.keep else unload_after_s,
            keep=spec.keep,
            timeout_s=spec.load_timeout_s or self.load_timeout_s,
        )

    def refuse_demand(self, where: str) -> None:
        """Refuse settings by which models are loaded by their requests, or unloaded; raises ConfigError."""
        rules = {spec.name: self.loading_of(spec) for spec in self.models}
        found = {
            "load: on_demand": any(not rule.at_start for rule in rules.values()),
            "unload_after": any(rule.unload_after_s < math.inf for rule in rules.values()),
            "max_loaded": self.max_loaded is not None,
        }
        for setting in (setting for setting, is_given in found.items() if is_given):
            raise ConfigError(f"there is none {where}, where all models stay loaded: remove it", key=setting)

    @classmethod
    def from_dict(cls, data: object, source: str = "pool.yaml") -> PoolConfig:
        """Check the parsed YAML of a pool file; errors name `source`, relative paths start at its folder."""
        with config_errors_under(source=source):
            return read_section(cls, data, os.path.dirname(os.path.abspath(source)))


def load_pool_file(path: str | os.PathLike[str]) -> PoolConfig:
    """Read and check a pool file; raises ConfigError, also for a file that cannot be read."""
    source = os.fspath(path)
    with config_errors_under(source=source):
        try:
            with open(source, "rb") as file:
                data = yaml.load(file, Loader=_UniqueKeyLoader)  # noqa: S506 - it is a SafeLoader
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


class _UniqueKeyLoader(SafeLoader):
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
