# SPDX-License-Identifier: Apache-2.0
"""The names that clients may send as `model`: each belongs to one model of the pool, or the router would guess."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from tokenpool.errors import ConfigError

if TYPE_CHECKING:
    from tokenpool.serve.launch_plan import ModelPlan
    from tokenpool.serve.router import ModelApp


def names_of(plan: ModelPlan) -> Iterator[tuple[str, str]]:
    """Each name of a model with the words for whoever claims it: the model, its served names, its adapters."""
    model = f"model {plan.spec.name!r}"
    yield plan.spec.name, model
    for name in dict.fromkeys(plan.args.served_model_name or ()):
        if name != plan.spec.name:
            yield name, f"--served-model-name of {model}"
    for adapter in plan.args.lora_modules or ():
        yield adapter.name, f"--lora-modules of {model}"


def series_names(model: ModelApp, plan: ModelPlan | None) -> set[str]:
    """All names under which metrics tell of a model and its adapters: those now loaded, and those of its flags."""
    return model.aliases() | {name for name, _ in names_of(plan)} if plan else model.aliases()


def check_names(plans: Iterable[ModelPlan], taken: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError when two claim one name; `taken` holds names that are served already."""
    owners = dict(taken or {})
    for plan in plans:
        for name, owner in names_of(plan):
            if name in owners:
                raise ConfigError(
                    f"the name {name!r} is claimed twice, by {owners[name]} and by {owner}: rename one of them"
                )
            owners[name] = owner
