# SPDX-License-Identifier: Apache-2.0
"""`/v1/pool/budget` and vLLM's sleep routes, with an operator that takes notes: who may, and what is read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient
from vllm.entrypoints.rl.factories import register_rl_api_routers
from vllm.entrypoints.serve import register_vllm_dev_api_routers

from tests.serve.access.test_auth import status
from tests.serve.gateway.test_router import make_app
from tokenpool.config import PoolConfig
from tokenpool.errors import CapacityError, ConfigError
from tokenpool.serve.access.admission import waits_for_tokens
from tokenpool.serve.access.auth import ApiKeyAuth
from tokenpool.serve.access.dev_routes import DEV_PATHS, REFUSED_PATHS, SERVED_PATHS, SLEEP_PATHS, dev_path_of
from tokenpool.serve.access.guard import guarded
from tokenpool.serve.clustered.no_lending import NoLending
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.wire.budget import BudgetOrder, BudgetState

pytestmark = pytest.mark.vllm

CLIENT, VIEW, ADMIN = ({"authorization": f"Bearer {kind}-key-0123456789"} for kind in ("client", "view", "admin"))


class Operator:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.orders: list[BudgetOrder] = []
        self.sleepers: dict[str, tuple[int, str]] = {}

    async def budget(self, order: BudgetOrder) -> BudgetState:
        self.orders.append(order)
        if order.device_memory == 1:
            raise CapacityError("too little")
        return BudgetState(order.device_memory or 0, order.host_memory or 7, 1, 9, asleep=await self.asleep())

    async def sleep(self, name: str, level: int, mode: str) -> None:
        self.sleepers[name] = level, mode

    async def wake(self, name: str) -> None:
        self.sleepers.pop(name, None)

    async def asleep(self) -> dict[str, int]:
        return {name: level for name, (level, _) in self.sleepers.items()}


def make_pool(*names: str) -> tuple[TestClient, Operator]:
    outer, operator = build_outer_app(), Operator()
    outer.state.operator = operator
    router = ModelRouter(outer, max_request_bytes=1 << 20)
    for name in names:
        router.add(ModelApp(name, make_app(name), "ready"))
    models = [{"name": name, "model": "org/a"} for name in names]
    keys = {f"{kind}_key": f"{prefix}-key-0123456789" for kind, prefix in
            (("api", "client"), ("view", "view"), ("admin", "admin"))}  # fmt: skip
    config = PoolConfig.from_dict({"models": models, **keys})
    return TestClient(guarded(router, config, None)), operator


@pytest.fixture
def dev_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")


def test_a_budget_is_read_and_told() -> None:
    """Sizes as in the pool file; what is left out stays; who looks needs a view key, who changes an admin key."""
    client, operator = make_pool("a")
    told = client.post("/v1/pool/budget", headers=ADMIN, json={"device_memory": "8GiB", "host_memory": 5})
    assert (200, 8 << 30, 5, False) == (told.status_code, *(told.json()[k] for k in
                                                            ("device_memory", "host_memory", "parked")))  # fmt: skip
    assert client.post("/v1/pool/budget", headers=ADMIN, json={"device_memory": 0}).json()["parked"]
    assert 200 == client.get("/v1/pool/budget", headers=VIEW).status_code
    assert [BudgetOrder(8 << 30, 5), BudgetOrder(0), BudgetOrder()] == operator.orders
    assert 507 == client.post("/v1/pool/budget", headers=ADMIN, json={"device_memory": 1}).status_code
    assert [403, 401] == [client.post("/v1/pool/budget", headers=key, json={}).status_code for key in (VIEW, CLIENT)]
    for body in ({}, [], "8GiB", {"pages": 1}, {"device_memory": None}, {"device_memory": -1}):
        assert 400 == client.post("/v1/pool/budget", headers=ADMIN, json=body).status_code
    assert 413 == client.post("/v1/pool/budget", headers=ADMIN, content=b" " * (65 << 10)).status_code
    assert 4 == len(operator.orders)


@pytest.mark.usefixtures("dev_mode")
def test_the_model_is_named_as_in_any_other_request() -> None:
    """By the path, the body or the query, and with one model not at all."""
    client, operator = make_pool("a", "org/b")
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/models/org/b/sleep?level=2&mode=wait", {}),
        ("/sleep?level=2&mode=wait", {"json": {"model": "org/b"}}),
        ("/sleep?level=2&mode=wait&model=org/b", {}),
    ]
    for path, request in ways:
        answer = client.post(path, headers=ADMIN, **request)
        assert (200, {"status": "sleeping", "level": 2}) == (answer.status_code, answer.json())
        assert {"org/b": (2, "wait")} == operator.sleepers
        assert {"is_sleeping": True} == client.get("/models/org/b/is_sleeping", headers=VIEW).json()
        assert {"is_sleeping": False} == client.get("/is_sleeping?model=a", headers=VIEW).json()
        woken = client.post("/wake_up?model=org/b&tags=weights", headers=ADMIN)
        assert ({"status": "awake", "tags": ["weights"]}, {}) == (woken.json(), operator.sleepers)
    assert 404 == client.post("/models/none/sleep", headers=ADMIN).status_code
    client, operator = make_pool("a")
    assert 200 == client.post("/sleep", headers=ADMIN).status_code
    assert {"a": (1, "keep")} == operator.sleepers
    wrong = ("/sleep?level=3", "/sleep?level=x", "/sleep?mode=none")
    assert [400] * 3 == [client.post(path, headers=ADMIN).status_code for path in wrong]
    assert 405 == client.get("/sleep", headers=ADMIN).status_code


@pytest.mark.usefixtures("dev_mode")
def test_only_an_admin_key_puts_a_model_to_sleep() -> None:
    """A view key looks; a client's key does neither, whichever way the model is named."""
    client, operator = make_pool("a")
    for path in ("/sleep", "/wake_up", "/models/a/sleep", "/models/a/wake_up"):
        assert [401, 403, 401] == [client.post(path, headers=key).status_code for key in (CLIENT, VIEW, {})]
    for path in ("/is_sleeping", "/models/a/is_sleeping"):
        assert [401, 200, 200] == [client.get(path, headers=key).status_code for key in (CLIENT, VIEW, ADMIN)]
    assert {} == operator.sleepers
    auth = ApiKeyAuth(make_app("a"), api_keys=(), admin_keys=(), guards_dev=True)
    assert [403, 403, 200] == [status(auth, path, method="POST") for path in ("/sleep", "/models/a/sleep", "/v1/x")]


def test_without_vllms_dev_mode_the_paths_are_the_models() -> None:
    """The pool answers none of them, and no other key is needed: vLLM's app says that they are not there."""
    client, operator = make_pool("a")
    answer = client.post("/sleep", headers=CLIENT)
    assert (200, "a") == (answer.status_code, answer.json()["app"])
    assert {} == operator.sleepers


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/models/a/is_sleeping", "/models/org/b/sleep"])
def test_paths_that_may_be_for_a_model_are_guarded(path: str) -> None:
    """Those of other routes that end alike are not, such as the card of a model whose name is `sleep`."""
    assert path.endswith(dev_path_of(path)) and dev_path_of(path) in SLEEP_PATHS
    assert not any(map(dev_path_of, (f"/v1{path}", f"{path}/x", "/v1/models/sleep")))


def test_each_of_vllms_routes_for_development_is_known() -> None:
    """In one list: what the pool answers, what the model's app answers, and what is refused."""
    app = FastAPI()
    register_vllm_dev_api_routers(app)
    register_rl_api_routers(app)
    assert {route.path for route in app.routes if isinstance(route, APIRoute)} == DEV_PATHS
    assert len(DEV_PATHS) == len(SLEEP_PATHS) + len(SERVED_PATHS) + len(REFUSED_PATHS)


@pytest.mark.usefixtures("dev_mode")
@pytest.mark.parametrize("prefix", ["", "/models/a"])
def test_only_an_admin_key_reaches_routes_for_development(prefix: str) -> None:
    """A view key does not even look; what would put the books wrong is refused with what to do."""
    client, _ = make_pool("a")
    for path in SERVED_PATHS | REFUSED_PATHS.keys():
        for method in ("GET", "POST"):
            statuses = [client.request(method, prefix + path, headers=key).status_code for key in (CLIENT, VIEW, {})]
            assert [401, 403, 401] == statuses
        answer = client.post(prefix + path, headers=ADMIN)
        if path in SERVED_PATHS:
            assert (200, "a") == (answer.status_code, answer.json()["app"])
        else:
            assert (400, REFUSED_PATHS[path]) == (answer.status_code, answer.json()["error"]["message"])
    auth = ApiKeyAuth(make_app("a"), api_keys=(), admin_keys=(), guards_dev=True)
    assert [403] * 2 == [status(auth, f"{prefix}/{path}", method="POST") for path in ("pause", "collective_rpc")]


@pytest.mark.parametrize("path", sorted(DEV_PATHS))
def test_routes_for_development_wait_in_no_queue(path: str) -> None:
    """A model that is paused with a full queue can be resumed."""
    assert not waits_for_tokens({"type": "http", "method": "POST"}, path)


def test_a_cluster_refuses_by_name() -> None:
    """One clear line for each."""
    lending = NoLending()
    asked: list[Any] = [lending.set_budget(BudgetOrder()), lending.sleep("a", 1, "keep")]
    for call in asked:
        with pytest.raises(ConfigError, match="on a Ray cluster"):
            asyncio.run(call)
    assert {} == dict(lending.asleep)
