# SPDX-License-Identifier: Apache-2.0
"""A running request moves to another host with its KV: by name, because its host leaves, or because of roles."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.server import ENV, TINY_ARGS

if TYPE_CHECKING:
    from tokenpool.serve.client.host_process import HostProcess
    from tokenpool.serve.client.model_client import ModelClient

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = [3 + (7 * i) % 500 for i in range(200)]
ARGS: dict[str, Any] = {**TINY_ARGS, "disable_log_stats": True}
NUM_BLOCKS = len(PROMPT) // TINY_ARGS["block_size"]
OPTIONS: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 120, "ignore_eos": True}


async def _tokens(client: ModelClient, request_id: str, *, after: int = 0, move: Any = None) -> list[int]:
    """The request's tokens; once there are `after` of them, `move` is called."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    tokens: list[int] = []
    async for output in client.engine.generate(
        {"prompt_token_ids": PROMPT}, SamplingParams(**OPTIONS, output_kind=RequestOutputKind.DELTA), request_id
    ):
        tokens += output.outputs[0].token_ids
        if move is not None and len(tokens) >= after:
            await move()
            move = None
    return tokens


def _num_tokenizers() -> int:
    """vLLM's tokenizers in this process, those in the frozen heap too."""
    gc.unfreeze()
    gc.collect()
    return sum("CachedTokenizer" in type(thing).__qualname__ for thing in gc.get_objects())


@asynccontextmanager
async def _two_hosts(model: str) -> AsyncIterator[tuple[ModelClient, HostProcess, HostProcess]]:
    """One model on the hosts `host` and `other`."""
    from tokenpool.config import PoolConfig
    from tokenpool.patches import apply_all
    from tokenpool.serve.client.host_process import HostProcess
    from tokenpool.serve.client.model_client import ModelClient
    from tokenpool.serve.launch.launch_plan import host_config, plan_pool

    apply_all()
    settings = {"device_memory": "32MiB", "host_memory": "64MiB", "page_size": "1MiB"}
    config = PoolConfig.from_dict({"models": [{"name": "m", "model": model, "args": ARGS}], **settings})
    config, plans = plan_pool(config)
    starts = [HostProcess.start(host_config(config, plans), plans[0].checked, name=name) for name in ("host", "other")]
    hosts = await asyncio.gather(*starts)
    client = await ModelClient.start(plans[0], hosts[0])
    try:
        await client.join(hosts[1])
        yield client, hosts[0], hosts[1]
    finally:
        await client.close()
        await asyncio.gather(*(host.kill() for host in hosts))


def test_streams_go_on_elsewhere_with_their_kv(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved by name, by a host that leaves, and from a prefill to a decode host: the tokens are those of a request
    that stayed, and the other host computes no block of the prompt again. A client that is closed leaves no memory."""
    from tokenpool.policy.capacity import Role
    from tokenpool.serve.client.model_client import RELEASE_AFTER_S

    for name, value in ENV.items():
        monkeypatch.setenv(name, value)

    async def run() -> None:
        tokenizers = _num_tokenizers()
        async with _two_hosts(str(tiny_models.path("qwen2"))) as (client, _, other):
            core = client.core
            first, second = core.hosts

            async def kv_hits() -> int:
                return (await other.call("state"))["kv_tier"]["hits"]

            core.set_role(second, Role.DECODE)  # new requests go to the first host only
            alone = await _tokens(client, "alone")
            assert len(alone) == OPTIONS["max_tokens"]

            core.set_role(second, Role.MIXED)
            core.route = lambda request, loads: first
            moved = await _tokens(client, "moved", after=40, move=lambda: _move(core, "moved", second))
            assert moved == alone
            assert core.load(first) == core.load(second) == 0
            hits = await kv_hits()
            assert hits >= NUM_BLOCKS

            core.set_role(first, Role.PREFILL)
            core.set_role(second, Role.DECODE)
            handed_over = core.num_handed_over
            assert await _tokens(client, "handed over") == alone
            assert core.num_handed_over == handed_over + 1

            core.set_role(first, Role.MIXED)
            core.set_role(second, Role.MIXED)
            left = await _tokens(client, "left", after=20, move=lambda: core.leave(first))
            assert left == alone
            assert core.hosts == [second]
            engine = weakref.ref(client.engine)
        client = core = None
        await asyncio.sleep(RELEASE_AFTER_S + 0.5)
        assert engine() is None, "a closed client stays in memory"
        # One is in vLLM's own cache, for the next model of that checkpoint.
        assert _num_tokenizers() <= tokenizers + 1, "tokenizers of a closed client stay in memory"

    asyncio.run(run())


@pytest.mark.parametrize("dies", ["source", "target"])
def test_no_token_is_lost_or_told_twice_when_a_host_dies_in_a_move(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """Killed between the offer and the blocks: the stream is that of a request that stayed, on the host that lives."""
    from tokenpool.serve.client.engine_link import EngineLink

    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    call, killed = EngineLink.call, []

    async def run() -> None:
        async with _two_hosts(str(tiny_models.path("qwen2"))) as (client, host, other):
            core = client.core
            first, second = core.hosts
            core.route = lambda request, loads: first if first in loads else second
            alone = await _tokens(client, "alone")
            dead, name, lives = (host, first, second) if dies == "source" else (other, second, first)

            async def call_and_die(link: Any, method: str, *args: Any) -> Any:
                if method == "import_kv":
                    killed.append(name)
                    await dead.kill()
                    core.lost(name)
                return await call(link, method, *args)

            monkeypatch.setattr(EngineLink, "call", call_and_die)

            async def move() -> None:
                (entry,) = core.journal.at(core._links[first])
                assert not await core.move_with_kv(entry.request_id, second), "KV came from or to a host that is dead"

            assert await _tokens(client, "moved", after=40, move=move) == alone
            assert core.hosts == [lives] and killed == [name]

    asyncio.run(run())


async def _move(core: Any, name: str, host: str) -> None:
    (entry,) = (e for e in core.journal.at(core._links[core.hosts[0]]) if name in e.request_id)
    assert await core.move_with_kv(entry.request_id, host)
