# SPDX-License-Identifier: Apache-2.0
"""Running requests of models with states go on in another engine as if they had stayed: nothing is computed again.

Both engines are in one host: one checkpoint under two names. What goes between them goes as between two hosts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, RequestSpec, Result, _params, run_plain
from tokenpool.host.kv.request_image import CAN_CARRY, MARK
from tokenpool.wire.continued_request import ContinuedRequest

if TYPE_CHECKING:
    from tests.helpers.pooled import PooledModels
    from tokenpool.host.kv_exchange import KVExchange, Offer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not CAN_CARRY, reason="this vLLM zeroes blocks that come from elsewhere: it computes again"),
]

OFTEN = ("qwen3_next",)
RARELY = ("mamba2", "granite_hybrid", "falcon_h1", "nemotron_h")
PAGE = 1 << 20
PAGES = 64
MAX_TOKENS = 64
LIMIT_S = 60.0
ALL_KINDS = [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in RARELY)]


def case_of(folder: Path, kind: str) -> Case:
    """A model with four requests, greedy and seeded."""
    return make_cases(folder, [kind], mixed(4, MAX_TOKENS))[kind]


class Pair:
    """Two engines of one model, `here` and `there`, and requests that go from one to the other."""

    def __init__(self, pooled: PooledModels, exchange: KVExchange, case: Case) -> None:
        self.pooled, self.exchange, self.case = pooled, exchange, case
        self.place = {request.request_id: "here" for request in case.requests}
        self.tokens: dict[str, list[int]] = {request_id: [] for request_id in self.place}
        self.logprobs: dict[str, list[float]] = {request_id: [] for request_id in self.place}
        self._seen: dict[tuple[str, str], int] = {}
        self._sent = 0
        self._wire = {request_id: request_id for request_id in self.place}

    def core(self, model: str) -> Any:
        return self.pooled.host.models[model].core

    def entries(self, model: str) -> list[bytes]:
        """Keys of images that the tier has for a model."""
        return [key for key in self.pooled.host.swapper.tier.entries_of(model) if key.startswith(MARK)]

    def start(self) -> None:
        self.pooled.submit(replace(self.case, name="here"))

    def step(self) -> None:
        self.pooled.run_once()
        for request_id, model in self.place.items():
            got = self.pooled._collected.get((model, self._wire[request_id]))
            if got is not None:
                have = self._seen.get((model, self._wire[request_id]), 0)
                self.tokens[request_id] += got.tokens[have:]
                self.logprobs[request_id] += got.logprobs[have:]
                self._seen[model, self._wire[request_id]] = len(got.tokens)

    def may_move(self, request_id: str) -> bool:
        """Whether it has a token, more to come, and has arrived where it is."""
        is_there = self._wire[request_id] in self.core(self.place[request_id]).scheduler.requests
        return is_there and 0 < len(self.tokens[request_id]) < MAX_TOKENS - 3

    def is_done(self, request_id: str) -> bool:
        return len(self.tokens[request_id]) == MAX_TOKENS

    def export(self, request_id: str) -> Offer:
        return self._wait(self.core(self.place[request_id]).export_kv(self._wire[request_id]))

    def fetch(self, offer: Offer, model: str) -> int:
        """Import an offer; the other requests go on meanwhile."""
        return self._wait(self.core(model).import_kv(offer))

    def _wait(self, future: Future[Any]) -> Any:
        limit = time.monotonic() + LIMIT_S
        while not future.done():
            self.step()
            assert time.monotonic() < limit
        return future.result()

    def send(self, request_id: str, model: str) -> None:
        """Let `model` go on with a request that is nowhere, or abort it where it is."""
        self.pooled.abort(self.place[request_id], self._wire[request_id])
        self.step()
        self._sent += 1
        spec = next(r for r in self.case.requests if r.request_id == request_id)
        wire_id, core = f"{request_id}~{self._sent}", self.core(model)
        message = self._message(spec, wire_id)
        self.pooled._collected[model, wire_id] = collected = self.pooled_collected()
        collected.request, _ = queued = core.preprocess_add_request(message)
        core.input_queue.put((self.add_type(), queued))
        self.place[request_id], self._wire[request_id] = model, wire_id

    def _message(self, spec: RequestSpec, wire_id: str) -> ContinuedRequest:
        return ContinuedRequest(
            request_id=wire_id,
            prompt_token_ids=spec.prompt_token_ids,
            mm_features=None,
            sampling_params=_params(spec, pooling=False),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            delivered_token_ids=list(self.tokens[spec.request_id]),
        )

    @staticmethod
    def pooled_collected() -> Any:
        from tests.helpers.pooled import _Collected

        return _Collected()

    @staticmethod
    def add_type() -> Any:
        from vllm.v1.engine import EngineCoreRequestType

        return EngineCoreRequestType.ADD

    def move(self, request_id: str) -> int:
        """Hand a request over to the other engine; returns how many blocks went with it."""
        target = "there" if self.place[request_id] == "here" else "here"
        offer = self.export(request_id)
        count = self.fetch(offer, target) if offer["keys"] else 0
        self.send(request_id, target)
        return count

    def finish(self) -> None:
        limit = time.monotonic() + LIMIT_S
        while not all(map(self.is_done, self.place)):
            self.step()
            assert time.monotonic() < limit, {name: len(tokens) for name, tokens in self.tokens.items()}

    def assert_equal(self, plain: dict[str, Result], *, but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Tokens and logprobs of all requests are plain vLLM's; `but` those that were computed again."""
        for request_id, result in plain.items():
            if request_id not in but:
                assert result.tokens == self.tokens[request_id], request_id
                assert result.logprobs == self.logprobs[request_id], request_id


@contextmanager
def pair(case: Case, folder: Path, **host_config: Any) -> Iterator[Pair]:
    from tests.helpers.pooled import PooledModels
    from tokenpool.host.kv_exchange import KVExchange

    settings: dict[str, Any] = {"host_memory": 64 << 20, **host_config}
    pooled = PooledModels(PAGES * PAGE, PAGE, poison=True, **settings)
    try:
        exchange = KVExchange(pooled.host, str(folder / "kv"))
        for name in ("here", "there"):
            pooled.add(replace(case, name=name))
            exchange.add(pooled.host.models[name])
        yield Pair(pooled, exchange, case)
        pooled.check()
    finally:
        pooled.close()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_requests_that_move_at_random_tokens_are_those_that_stayed(kind: str, tmp_path: Path) -> None:
    """Back and forth, several times each, beside requests that run: the same tokens and logprobs to the last bit."""
    case = case_of(tmp_path, kind)
    plain = run_plain([case])[kind]
    assert all(len(set(result.tokens)) > 8 for result in plain.values())
    rng, moved = random.Random(4), 0
    with pair(case, tmp_path) as both:
        both.start()
        while not all(map(both.is_done, both.place)):
            both.step()
            request_id = rng.choice([*both.place])
            if rng.random() < 0.8 and both.may_move(request_id):
                blocks = both.move(request_id)
                assert blocks > 0, f"{request_id} is computed again"
                moved += 1
        both.finish()
        both.assert_equal(plain)
        assert moved >= 4
        assert both.entries("here") == both.entries("there") == [], "an image is kept that nobody asks for"
        assert not sum(result.preempted for result in both.pooled.results("there").values())


def test_an_image_that_is_gone_or_late_costs_the_work_and_no_token(tmp_path: Path) -> None:
    """Evicted at the target, never fetched, or asked for before there is a token: the request is computed again."""
    case = case_of(tmp_path, "nemotron_h")
    with pair(case, tmp_path) as both:
        both.start()
        first, second, third, _ = both.place
        assert both.export(first)["keys"] == [], "there is no token yet"
        while not all(both.tokens.values()):
            both.step()
        offer = both.export(first)
        assert both.fetch(offer, "there") == len(offer["keys"]) > 0
        both.pooled.host.swapper.tier.discard("there", offer["keys"][-1])
        both.send(first, "there")
        assert both.export(second)["given_up"]
        both.send(second, "there")
        assert both.move(third) > 0
        both.finish()
        assert {len(tokens) for tokens in both.tokens.values()} == {MAX_TOKENS}


def test_a_request_goes_on_where_it_is_when_its_image_has_no_room(tmp_path: Path) -> None:
    """The tier takes nothing: the request was not ended, and its tokens are plain vLLM's."""
    case = case_of(tmp_path, "nemotron_h")
    plain = run_plain([case])["nemotron_h"]
    with pair(case, tmp_path, host_memory=0) as both:
        both.start()
        while not all(both.tokens.values()):
            both.step()
        for request_id in both.place:
            offer = both.export(request_id)
            assert not offer["given_up"] and not offer["keys"]
        both.finish()
        both.assert_equal(plain)
