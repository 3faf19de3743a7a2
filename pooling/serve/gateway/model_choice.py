# SPDX-License-Identifier: Apache-2.0
"""Which model a request is for, of those that whoever sent it may know of. Imports no vLLM.

To a tenant, a model that it may not use is as one that does not exist: no answer tells them apart.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.routing import Match
from starlette.types import Scope

from tokenpool.errors import show
from tokenpool.model_life import Life
from tokenpool.serve.access.auth import scope_below, touches_pool_api
from tokenpool.serve.access.refused import RefusedError, bad_request, not_found
from tokenpool.serve.access.tenants import Account
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.http.request_body import UnreadableModelError, body_model
from tokenpool.serve.launch.names import name_problem

ANY_MODEL_PATHS = frozenset({"/", "/docs", "/openapi.json", "/redoc"})
"""Pages that are alike in every model's app."""

_MODELS_PREFIX = "/models/"
_RESPONSES_PREFIX = "/v1/responses/"
_MAX_SHOWN = 200
"""Characters of a client's text that an answer repeats."""


def usable(models: Collection[ModelApp], account: Account | None) -> list[ModelApp]:
    """The models that a tenant may use; without a tenant all."""
    return [model for model in models if account is None or account.config.may_use(model.name)]


def unknown_model(name: str, known: Collection[ModelApp]) -> RefusedError:
    """404 with the names that there are."""
    return not_found(f"The model `{name[:_MAX_SHOWN]}` does not exist. {_names(known)}", "model")


def _names(known: Collection[ModelApp]) -> str:
    return f"Known models: {', '.join(name for model in known for name in model.names()) or '(none)'}"


class ModelChoice:
    """The models that one request may be for."""

    def __init__(self, models: Collection[ModelApp], account: Account | None) -> None:
        self._all = models
        self._account = account
        self._models = usable(models, account)

    def by_prefix(self, path: str, scope: Scope) -> tuple[ModelApp | None, Scope]:
        """Return the model a ``/models/<name>/`` path names and the scope below it; the longest name wins."""
        if touches_pool_api(path):
            # The admin API is at its own path only: no other spelling of it reaches any app.
            raise not_found(f"The path `{path[:_MAX_SHOWN]}` does not exist.")
        if not path.startswith(_MODELS_PREFIX):
            return None, scope
        rest = path[len(_MODELS_PREFIX) :]
        known = [(name, model) for model in self._models for name in model.aliases()]
        fits = [(name, model) for name, model in known if rest == name or rest.startswith(f"{name}/")]
        if not fits:
            raise self._unknown(rest.partition("/v1/")[0])
        name, model = max(fits, key=lambda fit: (len(fit[0]), fit[0] == fit[1].name))
        return model, scope_below(scope, _MODELS_PREFIX + name)

    async def by_request(self, path: str, scope: Scope, headers: Headers, body: bytes) -> ModelApp:
        """Return the model that body or query name, that has the response, or that is the only one."""
        try:
            name = await body_model(headers, body) if body else None
        except UnreadableModelError:
            return self._any()  # vLLM's own validation says what is wrong with it
        query = scope.get("query_string", b"")
        if name := name or (QueryParams(query).get("model") if b"model" in query else None):
            return self._by_name(name)
        tail = path[len(_RESPONSES_PREFIX) :] if path.startswith(_RESPONSES_PREFIX) else ""
        response_id = tail.partition("/")[0]
        owner = self._account.config.name if self._account is not None else ""
        for model in self._models:
            if len(self._models) == 1 or (response_id and model.has_response(response_id, owner)):
                return model
        if path in ANY_MODEL_PATHS and scope.get("method") in ("GET", "HEAD"):
            return self._any()
        return self._without_route(scope, response_id)

    def _without_route(self, scope: Scope, response_id: str) -> ModelApp:
        """Return a model whose app says that there is no such path or method, as vLLM would; else it must be named."""
        matches = [(model.match(scope), model) for model in self._models]
        best = max((match.value for match, _ in matches), default=Match.FULL.value)
        if best < Match.FULL.value:
            return _first_ready([model for match, model in matches if match.value == best])
        if response_id and self._models:
            message = f"Response with id '{response_id[:_MAX_SHOWN]}' not found."
            raise not_found(message, "response_id", kind="invalid_request_error")  # as vLLM's Responses API has it
        raise self._needed()

    def _by_name(self, name: str) -> ModelApp:
        # An adapter not loaded yet: vLLM's LoRA resolver plugins may find it, if one model alone has them.
        named = [model for model in self._models if model.name == name]
        resolvers = [model for model in self._models if model.resolves_adapters()] if not named else []
        fits = named or [model for model in self._models if name in model.aliases()] or resolvers[: len(resolvers) == 1]
        if not fits:
            raise self._unknown(name)
        return fits[0]

    def refuse_adapter(self, model: ModelApp, key: str, adapter: Any) -> None:
        """Refuse an adapter of `model` under a name that is a path, or leads to another model: nobody would reach it.

        What is no text, or an empty one, is vLLM's to refuse.
        """
        if not isinstance(adapter, str) or not adapter:
            return
        if not model.takes_adapters:
            raise bad_request(f"The model `{model.name}` takes no adapters: start it with --enable-lora.", "model")
        if problem := name_problem(adapter):
            raise bad_request(f"The name {show(adapter)} {problem}.", key)
        if any(adapter in other.aliases() | other.claimed for other in self._all if other is not model):
            shown = adapter[:_MAX_SHOWN]
            raise bad_request(f"The name `{shown}` belongs to another model: give the adapter another name.", key)

    def _any(self) -> ModelApp:
        if not self._models:
            raise self._needed()
        if (model := _first_ready(self._models)).state == Life.COLD:
            raise self._needed()  # none is loaded for what any could answer
        return model

    def _unknown(self, name: str) -> RefusedError:
        if self._account is not None:
            for model in self._all:
                if model not in self._models and name in model.aliases():
                    self._account.refused[model.name, "models"] += 1
        return unknown_model(name, self._models)

    def _needed(self) -> RefusedError:
        return bad_request(f"This request must say which `model` it is for. {_names(self._models)}", "model")


def _first_ready(models: Collection[ModelApp]) -> ModelApp:
    return min(models, key=lambda model: not model.is_ready)
