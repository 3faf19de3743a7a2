# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one machine serve one model: load spreads, a host can be left, and a killed one is made up for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.plain import ENGINE_ARGS, ENV
from tests.helpers.server import ENV as SERVER_ENV

if TYPE_CHECKING:
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.serve.client.host_process import HostProcess

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_TOKENS = 300
MODEL = "llama"
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy-0": {"temperature": 0.0},
    "greedy-1": {"temperature": 0.0, "presence_penalty": 1.0},
    "seeded-0": {"temperature": 1.0, "seed": 5},
    "seeded-1": {"temperature": 1.0, "seed": 6, "top_k": 30},
    "logprobs": {"temperature": 0.0, "logprobs": 1},
    "two": {"temperature": 1.0, "seed": 7, "n": 2},
}
NUM_SENT = 7  # "two" is sent as two requests


class Hosts:
    """Hosts by name, one model, one AsyncLLM on all of them."""

    def __init__(self, path: str) -> None:
        from tokenpool.serve.client.engine_client import PoolEngineClient

        self._path = path
        config = self._config()
        self.client: PoolEngineClient = PoolEngineClient(config)
        self._frontend_config = config
        self.hosts: dict[str, HostProcess] = {}
        self.llm: Any = None

    def _config(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        args = ENGINE_ARGS | {"max_model_len": 512, "enable_prefix_caching": False}
        args.pop("kv_cache_memory_bytes")
        return EngineArgs(model=self._path, **args).create_engine_config()

    async def start(self, name: str) -> None:
        """Start a host with the model and let it join."""
        from tokenpool.serve.client.host_process import HostProcess
        from tokenpool.wire.spec import HostConfig

        self.hosts[name] = await HostProcess.start(HostConfig(32 << 20, 1 << 20), self._config(), name=name)
        await self.add_model(name)

    async def add_model(self, name: str) -> None:
        from tokenpool.wire.spec import HostedModelSpec

        host = self.hosts[name]
        addresses = host.new_addresses()
        await host.call("add_model", HostedModelSpec(MODEL, self._config(), addresses))
        await self.client.join(name, addresses)

    def build_frontend(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        from tokenpool.patches.engine_client import handing_in

        with handing_in(self.client):
            self.llm = AsyncLLM.from_vllm_config(self._frontend_config, disable_log_stats=True)

    async def stop(self) -> None:
        self.client.close()
        if self.llm is not None:
            self.llm.shutdown()
        await asyncio.gather(*(host.kill() for host in self.hosts.values()))

    def streams(self, run: str) -> asyncio.Future[list[Any]]:
        """All requests at once; returns the future of the last outputs of each: index -> choice."""
        from vllm import SamplingParams, TokensPrompt

        async def one(name: str, options: dict[str, Any]) -> Any:
            params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **options)
            prompt = TokensPrompt(prompt_token_ids=list(range(3, 40)))
            choices: dict[int, Any] = {}  # each output has only those that got something
            async for output in self.llm.generate(prompt, params, f"{run}-{name}"):
                choices |= {choice.index: choice for choice in output.outputs}
            return choices

        return asyncio.gather(*(one(name, options) for name, options in REQUESTS.items()))

    def num_tokens_at(self, host: str) -> int:
        """The fewest tokens that a request at `host` has got so far; 0 if there is none."""
        journal = self.client.journal
        return min((len(entry.delivered) for entry in journal.at(self.client._links[host])), default=0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0.005)


def told(outputs: list[dict[int, Any]]) -> list[Any]:
    """What clients see of finished requests."""
    return [
        {
            index: (list(choice.token_ids), choice.text, choice.finish_reason, choice.cumulative_logprob)
            for index, choice in choices.items()
        }
        for choices in outputs
    ]


def test_streams_go_on_at_the_other_host(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is left, and one that is killed, change no token of any stream; no request waits for a restart."""
    for name, value in (SERVER_ENV | ENV).items():
        monkeypatch.setenv(name, value)
    from tokenpool.patches import apply_all

    apply_all()

    async def test() -> None:
        hosts = Hosts(str(tiny_models.path(MODEL)))
        client = hosts.client
        try:
            await asyncio.gather(hosts.start("one"), hosts.start("two"))
            hosts.build_frontend()
            alone = hosts.streams("alone")
            await until(lambda: len(client.journal) == NUM_SENT)
            assert [3, 4] == sorted(client.load(name) for name in client.hosts)
            want = told(await alone)

            moved = hosts.streams("moved")
            await until(lambda: hosts.num_tokens_at("one") > 5)
            assert client.load("one")
            await client.leave("one")
            assert (["two"], len(client.journal)) == (client.hosts, client.load("two"))
            assert want == told(await moved)
            await hosts.hosts["one"].call("remove_model", MODEL)
            await hosts.add_model("one")

            killed = hosts.streams("killed")
            await until(lambda: hosts.num_tokens_at("two") > 5)
            assert client.load("two")
            os.kill(hosts.hosts["two"].pid, signal.SIGKILL)
            await hosts.hosts["two"].wait()
            client.lost("two")
            assert (["one"], len(client.journal)) == (client.hosts, client.load("one") + client.num_waiting)
            assert want == told(await killed)
            assert 0 == client.load("one")
            await hosts.hosts["one"].call("check")
        finally:
            await hosts.stop()

    asyncio.run(test())
