# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/pool/hosts/{name}`: empties a host of a cluster, with an admin key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.access.guard import guarded
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu

ADMIN, VIEW = "admin-key-0123456789", "view-key-0123456789"


class Operator:
    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    async def drain(self, host: str, is_wanted: bool) -> list[str]:
        if host == "h9":
            raise ConfigError("there is no host 'h9'")
        self.asked.append((host, is_wanted))
        return ["a"]


def post(body: Any, host: str = "h0", key: str = ADMIN) -> tuple[int, Any, list[tuple[str, bool]]]:
    outer, operator = build_outer_app(), Operator()
    router = ModelRouter(outer, max_request_bytes=1000)
    outer.state.pool, outer.state.operator = SimpleNamespace(router=router), operator
    models = [{"name": "a", "model": "org/a"}]
    config = PoolConfig.from_dict({"models": models, "admin_key": ADMIN, "view_key": VIEW})
    client = TestClient(guarded(router, config, None))
    answer = client.post(f"/v1/pool/hosts/{host}", json=body, headers={"x-api-key": key})
    return answer.status_code, answer.json(), operator.asked


@pytest.mark.parametrize("is_wanted", [True, False])
def test_it_tells_what_is_still_there(is_wanted):
    status, body, asked = post({"draining": is_wanted})
    assert (status, body) == (200, {"host": "h0", "draining": is_wanted, "models": ["a"]})
    assert asked == [("h0", is_wanted)]


@pytest.mark.parametrize("body", [{}, [], {"draining": 1}, {"draining": True, "x": 1}, "true", None])
def test_a_wrong_body_changes_nothing(body):
    status, _, asked = post(body)
    assert (status, asked) == (400, [])


def test_an_unknown_host_is_refused():
    status, body, _ = post({"draining": True}, "h9")
    assert status == 400 and "there is no host" in body["error"]["message"]


def test_who_may_only_look_empties_no_host():
    assert post({"draining": True}, key=VIEW)[0] == 403
