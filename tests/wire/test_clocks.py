# SPDX-License-Identifier: Apache-2.0
"""Frontend and host on two machines, whose clocks differ by minutes: a request keeps its age, not its date."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.server import free_port
from tokenpool.wire.addresses import EngineAddresses

pytestmark = pytest.mark.vllm

SECONDS = st.floats(0, 1e4)


def sent(request: Any, addresses: EngineAddresses) -> Any:
    """The message in which a request goes to an engine that is reached there."""
    import zmq.asyncio
    from vllm.v1.engine import EngineCoreRequestType

    from tokenpool.serve.client.engine_link import EngineLink

    async def send() -> list[Any]:
        context, messages = zmq.asyncio.Context(), []
        link = EngineLink("h", context, addresses, 3, on_outputs=print, on_end=print)  # type: ignore[arg-type]
        link._send = lambda *message: messages.append(message)  # type: ignore[method-assign]
        link.add(request)
        link.close()
        context.term()
        return messages

    [(kind, message)] = asyncio.run(send())
    assert kind is EngineCoreRequestType.ADD and message.client_index == 3
    return message


def received(message: Any) -> Any:
    """What an engine makes of a message."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from tokenpool.wire.continued_request import ContinuedRequest, to_own_clock

    taken = MsgpackDecoder(ContinuedRequest).decode(MsgpackEncoder().encode(message))
    to_own_clock(taken)
    return taken


@settings(max_examples=30)
@given(ahead_s=st.floats(-1e6, 1e6), age_s=SECONDS, way_s=SECONDS)
def test_a_request_of_another_machine_keeps_its_age(ahead_s: float, age_s: float, way_s: float) -> None:
    """Whatever the host's clock says: when it comes, it is as old as it was when it was sent; its trace too."""
    from tests.helpers.told_engine import make_request
    from tokenpool.wire.trace import SINCE

    with pytest.MonkeyPatch.context() as patch:
        clock_s = time.time()
        patch.setattr(time, "time", lambda: clock_s)
        request = make_request("r")
        request.arrival_time = clock_s - age_s
        request.trace_headers = {"traceparent": "p", SINCE: repr(request.arrival_time)}
        message = sent(request, EngineAddresses(*((f"tcp://127.0.0.1:{free_port()}",) for _ in range(2))))
        clock_s += ahead_s + way_s
        taken = received(message)
    assert clock_s - taken.arrival_time == pytest.approx(age_s, abs=1e-3)
    assert taken.trace_headers == {"traceparent": "p", SINCE: repr(taken.arrival_time)}
    assert request.arrival_time == pytest.approx(clock_s - ahead_s - way_s - age_s), "the frontend's own stays"


def test_a_request_of_this_machine_keeps_its_date(tmp_path: Any) -> None:
    """Frontend and host have one clock then, and the way counts."""
    from tests.helpers.told_engine import make_request

    request = make_request("r")
    at = EngineAddresses((f"ipc://{tmp_path}/in",), (f"ipc://{tmp_path}/out",))
    assert received(sent(request, at)).arrival_time == request.arrival_time
