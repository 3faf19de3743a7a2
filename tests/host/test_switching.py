# SPDX-License-Identifier: Apache-2.0
"""More models than the device holds: weights and KV come and go at token boundaries and no stream changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, run_plain

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe")
PAGE = 256 << 10
PAGES = 16
"""For the weights of one model, at most 9 pages, and the KV of one or two; all weights together are 33 pages."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, mixed(5, 48), lora_kind="llama")


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    return run_plain(list(cases.values()), plain_gemm=True)


class RandomTurns:
    """A turn policy that lets a random model run for a random number of steps, and prefetches another now and then."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._left = 0

    def decide(self, pool):
        from tokenpool.policy.turns import Decision, Phase

        names = [view.model for view in pool.models]
        self._left -= 1
        run = pool.current
        if self._left <= 0 or run not in names:
            run, self._left = self._random.choice(names), self._random.randrange(1, 6)
        phase = self._random.choice(list(Phase)) if len(names) > 1 else Phase.MIXED
        running = next(view for view in pool.models if view.model == run).num_running
        prefetch = self._random.choice(names) if pool.can_prefetch and self._random.random() < 0.3 else None
        return Decision(run, phase if running else Phase.MIXED, None if prefetch == run else prefetch)


@pytest.fixture
def pool(request):
    from tests.helpers.pooled import PooledModels
    from tokenpool.memory.devices.cpu import CpuDevice

    options = {"movable_weights": True, "host_memory": 256 << 20} | getattr(request, "param", {})
    pages = options.pop("pages", PAGES)
    keeps_bytes = options.pop("keeps_bytes", True)
    pooled = PooledModels(pages * PAGE, PAGE, device=CpuDevice(keeps_bytes=keeps_bytes), poison=True, **options)
    yield pooled
    pooled.check()
    pooled.close()
    assert pooled.host.ledger.num_free + pooled.host.ledger.total("null") == pooled.host.ledger.num_pages
    assert set(pooled.host.host_ledger.snapshot()) <= {"cached_kv"}, "host memory of a removed model is still held"


def _use(pooled, policy) -> None:
    pooled.host._turns._policy = policy


def _assert_equal(pooled, reference, kinds, least: int, noise: float = 0.0) -> None:
    """Tokens are the same, and logprobs differ by no more than the `noise` that plain vLLM itself has."""
    compared = 0
    for kind in kinds:
        for request_id, got in pooled.results(kind).items():
            want = reference[kind][request_id]
            if got.preempted or want.preempted:
                assert len(want.tokens) == len(got.tokens)
                continue
            assert want.tokens == got.tokens, f"{request_id}: tokens differ"
            pairs = zip(want.logprobs, got.logprobs, strict=True)
            assert all(abs(a - b) <= noise for a, b in pairs), f"{request_id}: logprobs differ"
            compared += 1
    assert compared >= least, f"only {compared} streams were compared"


@pytest.mark.parametrize(
    ("pool", "seed"), [({}, 1), pytest.param({"keeps_bytes": False}, 2, marks=pytest.mark.slow)], indirect=["pool"]
)
def test_switches_at_random_token_boundaries_change_no_stream(pool, cases, reference, seed):
    """Six models on memory for two, weights and KV poisoned when they leave: each gives what it gives alone."""
    _use(pool, RandomTurns(seed))
    for case in cases.values():
        pool.add(case)
    for case in cases.values():
        pool.submit(case)
    pool.run(each_step=lambda step: step % 25 or pool.check())

    counters, swaps = pool.host.residency.counters, pool.host.swapper.counters
    assert counters.weight_evictions > 50
    assert swaps.blocks_in > 100
    assert pool.host.weights.device.bytes_to_host == 0
    _assert_equal(pool, reference, KINDS, least=20)


@pytest.mark.parametrize(
    "pool",
    [
        pytest.param({"policy": name}, id=name, marks=[] if name in ("aegaeon", "slack") else pytest.mark.slow)
        for name in ("round_robin", "request_level", "aegaeon", "slack")
    ],
    indirect=True,
)
def test_every_policy_serves_more_models_than_fit(pool, cases, reference):
    """Whatever the policy decides, all requests end and no stream changes."""
    kinds = ("llama", "gemma3", "qwen3_moe")
    for kind in kinds:
        pool.add(cases[kind])
    for kind in kinds:
        pool.submit(cases[kind])
    pool.run(each_step=lambda step: step % 25 or pool.check())

    counters, swaps = pool.host.residency.counters, pool.host.swapper.counters
    assert counters.weight_evictions > 0
    assert counters.kv_evictions <= swaps.blocks_out, "an eviction of KV that moved none"
    _assert_equal(pool, reference, kinds, least=10)


@pytest.mark.slow
@pytest.mark.parametrize("pool", [{"pages": 12}], indirect=True)
def test_a_compiled_model_comes_and_goes(pool, cases):
    """With torch.compile, whose code finds weights at addresses that stay, switches change no stream either."""
    compiled = {}
    for kind in ("llama", "qwen2"):
        args = {"max_model_len": 512} | ({"enforce_eager": False} if kind == "llama" else {})
        requests = [replace(request, lora=None) for request in cases[kind].requests[:3]]
        compiled[kind] = Case(kind, cases[kind].model, args, requests)
    expected = run_plain(list(compiled.values()), plain_gemm=True)
    _use(pool, RandomTurns(4))
    for case in compiled.values():
        pool.add(case)
    for case in compiled.values():
        pool.submit(case)
    pool.run()

    assert pool.host.residency.counters.weight_evictions > 10
    _assert_equal(pool, expected, compiled, least=5)


@pytest.mark.parametrize("pool", [{"pages": 15}], indirect=True)
def test_a_switch_moves_what_its_plan_says(pool, cases):
    """Bytes of weights and KV that are copied equal those of the plan; no weights go to the host."""
    for kind in ("llama", "gemma3"):
        pool.add(cases[kind])
        pool.submit(cases[kind])
    host, checked = pool.host, 0
    for _ in range(200):
        before = (host.weights.device.bytes_to_device, host.swapper.counters.bytes_out, host.swapper.counters.bytes_in)
        switches = host.residency.counters.switches
        pool.run_once()
        if host.residency.counters.switches != switches + 1:
            continue
        plan = host.residency.last_plan.bytes_by_kind
        after = (host.weights.device.bytes_to_device, host.swapper.counters.bytes_out, host.swapper.counters.bytes_in)
        assert tuple(a - b for a, b in zip(after, before, strict=True)) == tuple(
            plan.get(kind, 0) for kind in ("weights_in", "kv_out", "kv_in")
        )
        checked += 1
    pool.run()

    assert checked > 20
    assert host.weights.device.bytes_to_host == 0


def test_requests_that_come_and_go_while_their_model_is_away(pool, cases, reference):
    """Aborts and new requests reach a model that is off the device; the others' streams and its own are right."""
    kinds = ("llama", "qwen2", "gemma3")
    _use(pool, RandomTurns(3))
    for kind in kinds:
        pool.add(cases[kind])
    for kind in kinds:
        for request in cases[kind].requests[:4]:
            pool.submit_one(kind, request, sorted({r.lora for r in cases[kind].requests if r.lora}))
    aborted = set()

    def disturb(step: int) -> None:
        away = [k for k in kinds if not pool.host.residency.is_ready(pool.host.models[k])]
        if step in (20, 40) and away:
            pool.abort(away[0], f"{away[0]}-3")
            aborted.add(f"{away[0]}-3")
        if step % 25 == 0:
            pool.check()

    pool.run(each_step=disturb)

    assert aborted
    for kind in kinds:
        results = pool.results(kind)
        for request in cases[kind].requests[:3]:
            assert len(results[request.request_id].tokens) == request.max_tokens
