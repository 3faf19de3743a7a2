# SPDX-License-Identifier: Apache-2.0
"""The names that clients may send as `model`: each belongs to one model of the pool, or the router would guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set

from tokenpool.errors import ConfigError, show
from tokenpool.serve.launch.model_plan import ModelPlan

_SEGMENT = re.compile(r"(?!\.{1,2}\Z)[^/\x00-\x1f\x7f\ud800-\udfff]+")
MOST_LETTERS = 512
"""Of a name; longer ones are no use in a URL."""


def name_problem(name: object) -> str | None:
    """Why `name` cannot be a name of a model or an adapter; None if it can. `org/name` is one."""
    if not isinstance(name, str) or not name:
        return "is no name: give a text"
    if len(name) > MOST_LETTERS:
        return f"is longer than {MOST_LETTERS} letters"
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        return "is a path or has control characters: no part between slashes may be empty, . or .."
    if name != name.strip():
        return "begins or ends with a space"
    return None


def names_of(plan: ModelPlan) -> Iterator[tuple[str, str]]:
    """Each name of a model with the words for whoever claims it: the model, its served names, its adapters."""
    model = f"model {plan.spec.name!r}"
    yield plan.spec.name, model
    for name in dict.fromkeys(plan.args.served_model_name or ()):
        if name != plan.spec.name:
            yield name, f"--served-model-name of {model}"
    for adapter in plan.args.lora_modules or ():
        yield adapter.name, f"--lora-modules of {model}"
    for name in plan.args.default_mm_loras or ():
        yield name, f"--default-mm-loras of {model}"


def series_names(aliases: Set[str], plan: ModelPlan | None) -> set[str]:
    """All names under which metrics tell of a model and its adapters: those now loaded, and those of its flags."""
    return {*aliases, *(name for name, _ in names_of(plan))} if plan else {*aliases}


def check_names(plans: Iterable[ModelPlan], taken: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for a name that is a path, and when two claim one; `taken` holds names served already."""
    owners = dict(taken or {})
    for plan in plans:
        for name, owner in names_of(plan):
            # A model that was given as a path and nothing else is called so, as with vLLM.
            if name != plan.spec.name and (problem := name_problem(name)):
                raise ConfigError(f"the name {show(name)}, of {owner}, {problem}; rename it")
            if name in owners:
                raise ConfigError(
                    f"the name {name!r} is claimed twice, by {owners[name]} and by {owner}: rename one of them"
                )
            owners[name] = owner
