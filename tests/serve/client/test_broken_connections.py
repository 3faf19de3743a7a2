# SPDX-License-Identifier: Apache-2.0
"""A connection to an engine on another machine breaks while both live: no token is lost or comes twice.

ZMQ would begin another connection and say nothing of what was lost with the first one.
"""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.network.wire import Wire
from tests.helpers.server import free_port
from tokenpool.cluster.values import Endpoints, ModelView, SeatState, SeatView

if TYPE_CHECKING:
    from tests.helpers.told_engine import ToldEngine

pytestmark = pytest.mark.vllm

SILENCE_S = 0.4


class Machine:
    """Another machine: engines there reach a frontend of this one over wires."""

    def __init__(self) -> None:
        self.engines: list[ToldEngine] = []
        self.wires: list[Wire] = []
        self.reached = asyncio.Event()
        self.reached.set()

    async def attach(self, made: Endpoints) -> ToldEngine:
        """Let an engine serve the frontend that listens there, once this machine can be reached."""
        from tests.helpers.told_engine import ToldEngine
        from tokenpool.wire.addresses import EngineAddresses

        await self.reached.wait()
        wires = [await Wire.to(int(address.rpartition(":")[2])) for address in made[:2]]
        self.wires += wires
        at = [f"tcp://127.0.0.1:{wire.port}" for wire in wires]
        self.engines.append(ToldEngine(EngineAddresses((at[0],), (at[1],), made.server_key)))
        return self.engines[-1]

    def close(self) -> None:
        for part in (*self.engines, *self.wires):
            part.close()


async def until(look: Any) -> None:
    async with asyncio.timeout(30):
        while not look():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["cut", "fall_silent"])
@pytest.mark.parametrize("which", [0, 1], ids=["input", "output"])
def test_requests_of_a_broken_connection_go_on_over_the_next_one(how: str, which: int) -> None:
    """After the tokens that came before; what the engine says on the old one, before or after, is not heard."""
    import zmq

    from tests.helpers.told_engine import make_request
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.wire.addresses import EngineAddresses

    async def test() -> None:
        client = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()))  # type: ignore[arg-type]
        client._knows_config = True
        broken: list[str] = []
        tokens: list[int] = []
        at_frontend: list[list[str]] = []
        client.on_broken = broken.append
        machine = Machine()

        async def join() -> ToldEngine:
            public, secret = zmq.curve_keypair()
            at = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
            at_frontend.append(at)
            attach = partial(machine.attach, Endpoints(*at, public))
            await client.join("h0/x", EngineAddresses((at[0],), (at[1],), public, secret, SILENCE_S), attach)
            return machine.engines[-1]

        async def take(count: int) -> None:
            while len(tokens) < count:
                outputs = await asyncio.wait_for(client.get_output_async(), 30)
                tokens.extend(token for output in outputs.outputs for token in output.new_token_ids)

        try:
            engine = await join()
            await client.add_request_async(make_request("r"))
            assert (await engine.added()).request_id == "r"
            engine.say({"r": [1, 2]})
            await take(2)
            for address in at_frontend[-1]:  # whoever has no key disturbs nobody
                _, stranger = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
                stranger.close()
                await stranger.wait_closed()
            getattr(machine.wires[which], how)()
            engine.say({"r": [3]})
            await until(lambda: broken)
            assert (broken, client.hosts, client.num_waiting) == (["h0/x"], [], 0)
            engine.say({"r": [4]})
            after = await join()
            again = await after.added()
            rest = [1, 2, 3, 4, 5][len(again.delivered_token_ids) :]  # 3 may have come, 4 cannot have
            assert len(rest) in (2, 3)
            after.say({again.request_id: rest}, finished=[again.request_id])
            await take(5)
            assert tokens == [1, 2, 3, 4, 5]
            assert len(client.journal) == 0 and broken == ["h0/x"]
        finally:
            client.close()
            machine.close()

    asyncio.run(test())


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_broken_connection_is_begun_anew(is_reached: bool) -> None:
    """By attaching once more; while the host cannot be reached, its requests go to another one. Nobody is blamed."""
    from tests.helpers.told_engine import make_request
    from tokenpool.cluster_config import ClusterConfig
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.serve.clustered import cluster_model
    from tokenpool.serve.clustered.cluster_model import ClusterModel, EndpointMaker

    async def test() -> None:
        machines = {"h0": Machine(), "h1": Machine()}
        attached: list[str] = []

        async def tell(method: str, model: str, host: str, life: str, *args: Any) -> None:
            if method == "attach":
                await machines[host].attach(*args)
                attached.append(host)

        plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
        model = ClusterModel(plan, 1, tell, EndpointMaker("", "127.0.0.1", ClusterConfig()), lambda _: None)
        model.client = object()
        model._core = core = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()))  # type: ignore[arg-type]
        core._knows_config = True
        core.on_broken = model._join_again
        seats = {host: SeatView("x", SeatState.SERVING, 1, "", "another") for host in machines}
        try:
            model.apply(ModelView(1, {"h0": seats["h0"]}), {"h0": "x"}, {})
            await until(lambda: core.hosts == ["h0/x"])
            await core.add_request_async(make_request("r"))
            await machines["h0"].engines[0].added()
            model.apply(ModelView(1, seats), {"h0": "x", "h1": "x"}, {})
            await until(lambda: core.hosts == ["h0/x", "h1/x"])

            if not is_reached:
                machines["h0"].reached.clear()
            machines["h0"].wires[0].cut()
            await until(lambda: core.hosts == (["h1/x", "h0/x"] if is_reached else ["h1/x"]))
            again = await machines["h1"].engines[0].added()
            assert again.request_id != "r" and core.journal.get("r").num_losses == 0  # type: ignore[union-attr]
            machines["h0"].reached.set()
            await until(lambda: core.hosts == ["h1/x", "h0/x"])
            assert attached == ["h0", "h1", "h0"]
        finally:
            core.close()
            for machine in machines.values():
                machine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_model, "_VIEW_S", 0.1)
        asyncio.run(test())


def test_a_peer_that_goes_while_its_connection_is_closed_stops_no_other_one() -> None:
    """ZMQ's thread would wait for somebody to read of that, and with it all later connections of the model."""
    import zmq
    import zmq.asyncio

    from tokenpool.serve.client.engine_link import _Connection

    async def test() -> None:
        context, others = zmq.asyncio.Context(), zmq.Context()

        async def greeted() -> tuple[zmq.asyncio.Socket, zmq.Socket[bytes], _Connection]:
            listening, peer = context.socket(zmq.ROUTER), others.socket(zmq.DEALER)
            connection = _Connection(listening)
            peer.connect(f"tcp://127.0.0.1:{listening.bind_to_random_port('tcp://127.0.0.1')}")
            peer.send(b"hello")
            async with asyncio.timeout(20):
                await connection.begun()
                assert (await listening.recv_multipart())[-1] == b"hello"
            return listening, peer, connection

        first, peer, connection = await greeted()
        connection.close()
        connection.close()
        peer.close(0)
        others.term()  # by now the other end has been told
        others = zmq.Context()
        second, peer, connection = await greeted()
        for made in (connection, first, second):
            made.close()
        peer.close(0)
        others.term()
        context.term()

    asyncio.run(test())
