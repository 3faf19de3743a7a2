# SPDX-License-Identifier: Apache-2.0
"""One model of the pool as the router knows it, and what a call into its app may end with.

Imports no vLLM: an app is any ASGI callable, and the few attributes read from ``app.state`` are optional.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenpool.model_life import Life, check_move
from tokenpool.serve.access.admission import EngineQueue, Gate, Ticket
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.holding import Hold
from tokenpool.serve.access.stored_responses import has_response

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 3600.0


@dataclass(slots=True, eq=False)
class ModelApp:
    """One model of the pool and the app that serves it; owned by the event loop's thread."""

    name: str
    app: ASGIApp
    state: Life = Life.LOADING
    retry_after_s: float = 1.0
    """When a client refused now should come back."""
    reason: str = ""
    """Why it is `failed`, in one line; empty in other states."""
    inflight: int = 0
    """Calls into `app` that have not returned."""
    gate: Gate = field(default_factory=Gate)
    """Which requests are taken in, and how many of them wait."""
    claimed: Set[str] = frozenset()
    """Names that its flags give to it and its adapters, which it has as soon as it is loaded."""
    hold: Hold = field(default_factory=Hold)
    """Where requests wait while it is not loaded."""
    is_resting: bool = False
    """While it drains: whether it gets cold then, and is not removed."""
    last_used_s: float = field(default_factory=time.monotonic)
    """When its last call began or ended, on the monotonic clock."""
    on_wanted: Callable[[], None] = lambda: None
    """Told when a request begins to wait."""
    progress: Callable[[], str] = lambda: ""
    """How far its loading has come, in a few words."""

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == Life.READY

    def move(self, state: Life) -> None:
        """Go on to another state of its life, if the table of lives lets it."""
        check_move(self.state, state)
        self.show(state)

    def show(self, state: Life) -> None:
        """Be in another state, as somebody else says who has followed the table; what waits for it gets on."""
        self.state = state
        if self.is_ready:
            self.hold.let_in()
        elif not self.may_come:
            self.hold.refuse(self.refusal)

    @property
    def holds(self) -> bool:
        """Whether requests begin to wait for it now."""
        return self.state in (Life.COLD, Life.LOADING) or (self.state == Life.DRAINING and self.is_resting)

    @property
    def may_come(self) -> bool:
        """Whether requests that wait for it wait on: those of a model whose host died, too."""
        return self.holds or self.state == Life.UNAVAILABLE

    @property
    def goes_on(self) -> bool:
        """Whether what came in while it was ready goes on."""
        return self.is_ready or (self.state == Life.DRAINING and self.is_resting)

    def want(self) -> None:
        """Somebody begins to wait for it: it is to be loaded."""
        if self.state == Life.COLD:
            self.move(Life.LOADING)
        self.on_wanted()

    def answer_with_nothing(self) -> None:
        """Forget whoever answered its requests: nothing of it is left."""
        self.app = no_app
        self.gate.serve_from(EngineQueue, 1)

    def answer_with(self, client: Any) -> None:
        """Send its requests to this client of its engines, a `ModelClient` or what stands for one."""
        self.app = client.app
        self.gate.serve_from(client.queue, client.num_seats)

    def names(self) -> list[str]:
        """Its name, and then its aliases in order."""
        return [self.name, *sorted(self.aliases() - {self.name})]

    def aliases(self) -> set[str]:
        """Return the names this model answers to: its own, vLLM's served names, LoRA adapters now loaded."""
        models = self.handler("openai_serving_models")
        if models is None:
            return {self.name, *self.claimed}
        served = (path.name for path in getattr(models, "base_model_paths", ()))
        return {self.name, *served, *getattr(models, "lora_requests", ())}

    def resolves_adapters(self) -> bool:
        """Tell whether vLLM may find an adapter for a name it has not seen (LoRA resolver plugins)."""
        return bool(getattr(self.handler("openai_serving_models"), "lora_resolvers", ()))

    @property
    def takes_adapters(self) -> bool:
        """Whether it was started with LoRA; so it is taken to be where it does not tell."""
        config = getattr(getattr(self.handler("openai_serving_models"), "engine_client", None), "vllm_config", None)
        return config is None or config.lora_config is not None

    def has_response(self, response_id: str, owner: str = "") -> bool:
        """Tell whether vLLM's Responses API of this model has stored `response_id`, for that tenant."""
        return has_response(self.handler("openai_serving_responses"), response_id, owner)

    def refusal(self) -> Response:
        """Return a 503 that says why the model does not answer, with Retry-After in whole seconds, >= 1."""
        wait_s = math.ceil(min(max(1.0, self.retry_after_s), _MAX_RETRY_AFTER_S))
        reason = "did not answer" if self.is_ready else f"is {self.state}"
        if self.reason:
            reason += f" ({self.reason})"
        message = f"The model `{self.name}` {reason}; retry after {wait_s} s."
        headers = {"retry-after": str(wait_s)}
        return error_response(503, "ServiceUnavailableError", message, "model", headers)

    def match(self, scope: Scope) -> Match:
        """Tell whether its app has a route for a request: with the method, with another one only, or none.

        An app that does not tell its routes, such as that of a model which is not there yet, may have any.
        """
        routes = getattr(getattr(self.app, "router", None), "routes", None)
        if routes is None:
            return Match.FULL
        return max((route.matches(scope)[0] for route in routes), key=lambda match: match.value, default=Match.NONE)

    def has_route(self, scope: Scope) -> bool:
        """Tell whether its app may have a route for the path of a request; see `match`."""
        return self.match(scope) is not Match.NONE

    def handler(self, attribute: str) -> Any:
        """Return one of the handlers that vLLM keeps in ``app.state``, or None."""
        return getattr(getattr(self.app, "state", None), attribute, None)


async def no_app(scope: Any, receive: Any, send: Any) -> None:
    """The app of a model that is not built."""
    raise AssertionError("a model that is not ready takes no requests")


async def call_app(model: ModelApp, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the model's app; a crash, or a 500 of a model that lost its engine, becomes a 503 to retry."""
    started, replaced = scope["type"] == "websocket", False
    held: Message | None = None  # the start of a 500, until its body comes

    async def guarded(message: Message) -> None:
        nonlocal started, replaced, held
        if replaced:
            return
        if not started:
            if message["type"] == "http.response.start" and message["status"] == 500:
                held = message
                return
            if held is not None and model.state in (Life.UNAVAILABLE, Life.FAILED):
                replaced = True
                await model.refusal()(scope, receive, send)
                return
            started = held is not None or message["type"] == "http.response.start"
            if held is not None:
                await send(held)
        ticket.note(message)
        await send(message)

    model.inflight += 1
    model.last_used_s = time.monotonic()
    try:
        await model.app(scope, receive, guarded)
    except Exception:  # of any code behind a route: the client gets an answer all the same
        if started:
            raise  # the server cuts the connection: the client must not take half an answer for a whole one
        logger.exception("app raised before it answered model=%s state=%s", model.name, model.state)
        if not replaced:
            await model.refusal()(scope, receive, send)
    finally:
        ticket.close()
        model.inflight -= 1
        model.last_used_s = time.monotonic()
