# SPDX-License-Identifier: Apache-2.0
"""The numbers of all tenants are for the pool's own keys and for metrics keys, which open nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import TENANT_KEY
from tokenpool.serve.access.guard import guarded
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.cpu

KEYS = {name: f"{name}-key-0123456789" for name in ("api", "admin", "metrics", "a", "b")}
CHAT = "/v1/chat/completions"
POOL = {
    "models": [{"name": "m", "model": "org/m"}],
    "api_key": KEYS["api"], "admin_key": KEYS["admin"], "metrics_key": [KEYS["metrics"]],
}  # fmt: skip
TENANTS = [{"name": name, "keys": hash_key(KEYS[name])} for name in "ab"]
HIDDEN = ("/metrics", "/metrics/", "/metricsx", "/models/m/metrics", "/models/m/metrics/", "/models/m/load", "/load/")


async def pool(scope: Any, receive: Any, send: Any) -> None:
    """Tells for whom a request came in."""
    account = scope.get(TENANT_KEY)
    await JSONResponse({"for": account and account.config.name})(scope, receive, send)


class Port:
    def __init__(self, **settings: Any) -> None:
        self.config = PoolConfig.from_dict(POOL | settings)
        self.book = TenantBook.of(self.config, None, 0)
        self.app = guarded(pool, self.config, self.book)

    def get(self, key: str | None, path: str, method: str = "GET") -> tuple[int, Any]:
        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://pool") as client:
                return await client.request(method, path, headers={"x-api-key": KEYS[key]} if key else {})

        answer = asyncio.run(main())
        return answer.status_code, answer.json()


@pytest.mark.parametrize("path", HIDDEN)
def test_no_tenant_sees_the_metrics(path):
    """Whatever way leads to them; keys of the pool see them as before."""
    port = Port(tenants=TENANTS)
    assert [403, 403, 401] == [port.get(key, path)[0] for key in ("a", "b", None)]
    assert [(200, {"for": "default"})] * 2 == [port.get(key, path) for key in ("api", "admin")]


def test_a_tenant_sees_its_own_load():
    """`/load` tells each tenant of its sequences, and the pool's keys of all."""
    port = Port(tenants=TENANTS)
    assert port.book is not None
    scope = {"type": "http", "method": "POST"}
    port.book.accounts["a"].begin(scope, "m", 0, 3)
    port.book.accounts["a"].begin(scope, "n", 0)
    assert (200, {"server_load": 4, "models": {"m": 3, "n": 1}}) == port.get("a", "/load")
    assert (200, {"server_load": 0, "models": {}}) == port.get("b", "/load")
    assert (200, {"for": "default"}) == port.get("api", "/load")


def test_other_paths_are_not_concerned():
    """Models, their cards and routes are for tenants, also under names that end alike."""
    port = Port(tenants=TENANTS)
    models = ("/v1/models", "/v1/models/my/load", "/v1/models/metrics")
    for path in (CHAT, *models, "/models/m/v1/completions", "/version"):
        assert (200, {"for": "a"}) == port.get("a", path)


@pytest.mark.parametrize("tenants", [TENANTS, []])
def test_a_metrics_key_reads_numbers_and_nothing_else(tenants):
    """It sees all, is nobody's account, and opens no model and no pool API."""
    port = Port(tenants=tenants)
    assert [(200, {"for": None})] * 3 == [port.get("metrics", path) for path in ("/metrics", "/load", "/health")]
    refused = (CHAT, "/v1/models", "/models/m/metrics", "/metrics/", "/version", "/")
    assert [403] * len(refused) == [port.get("metrics", path)[0] for path in refused]
    assert [401, 401] == [port.get("metrics", f"/v1/pool/{path}")[0] for path in ("state", "tenants")]


def test_without_tenants_clients_see_the_metrics():
    """A pool file without `tenants` works as if they did not exist."""
    port = Port()
    assert [(200, {"for": None})] * 2 == [port.get(key, "/metrics") for key in ("api", "admin")]


def test_a_metrics_key_that_guards_nothing_is_refused():
    """Where everybody may do everything the key would only look like one; keys belong to one purpose."""
    with pytest.raises(ConfigError, match="guards nothing"):
        PoolConfig.from_dict({"models": POOL["models"], "metrics_key": KEYS["metrics"]})
    with pytest.raises(ConfigError, match="this key is in"):
        PoolConfig.from_dict(POOL | {"tenants": [{"name": "a", "keys": hash_key(KEYS["metrics"])}]})


def test_a_websocket_with_a_metrics_key_is_closed():
    """1008, as without a key."""
    sent: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "headers": [(b"x-api-key", KEYS["metrics"].encode())]}
        await Port(tenants=TENANTS).app(scope, asyncio.Event().wait, send)

    asyncio.run(main())
    assert [("websocket.close", 1008)] == [(message["type"], message["code"]) for message in sent]


def test_requests_without_body_are_passed_on():
    """The guard reads nothing of what it passes on."""

    async def main() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await JSONResponse({"body": (await Request(scope, receive).body()).decode()})(scope, receive, send)

        config = PoolConfig.from_dict(POOL | {"tenants": TENANTS})
        port = guarded(app, config, TenantBook.of(config, None, 0))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(port), base_url="http://pool") as client:
            answer = await client.post(CHAT, content=b"whole", headers={"x-api-key": KEYS["a"]})
        assert {"body": "whole"} == answer.json()

    asyncio.run(main())


PICKER = ("/metrics/picker", "/metrics/picker/", "/metrics/picker/org/m")


@pytest.mark.parametrize("path", PICKER)
def test_a_picker_needs_no_key_where_the_pool_file_says_so(path):
    """Else it is read as the other numbers are."""
    shut, open_to_all = Port(tenants=TENANTS), Port(tenants=TENANTS, open_picker_metrics=True)
    assert [401, 403, 200, 200] == [shut.get(key, path)[0] for key in (None, "a", "metrics", "api")]
    assert [200, 200, 200] == [open_to_all.get(key, path)[0] for key in (None, "metrics", "api")]


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/metrics/", "/metrics/pickers", "/models/m/metrics/picker", "/metrics/picker/../../v1/pool/state",
     "/metrics/picker/%2e%2e/%2e%2e/v1/pool/state", "/metrics//picker"],
)  # fmt: skip
def test_nothing_else_is_opened_for_a_picker(path):
    """No neighbour of the path, and no spelling that leads elsewhere."""
    assert Port(open_picker_metrics=True).get(None, path)[0] == 401
