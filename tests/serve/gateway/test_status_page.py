# SPDX-License-Identifier: Apache-2.0
"""The status page: what is served at /pool, and what a real browser makes of a real server's state."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.browser import HOW_TO_GET, Browser, Page, find_browser
from tests.helpers.server import PoolServerProcess

pytestmark = pytest.mark.vllm

KEY_FIELD = "document.activeElement.id === 'key'"
BOARD = "!document.getElementById('board').hidden"


def row(name: str) -> str:
    """An expression for the text of a model's row, one space between words."""
    rows = "[...document.querySelectorAll('#models tbody tr')]"
    return f"{rows}.find(r => r.innerText.startsWith({json.dumps(name)}))?.innerText.replace(/\\s+/g, ' ')"


# -- what is served ---------------------------------------------------------------------------------------


def test_the_page_needs_no_key_and_holds_none(pool_server: PoolServerProcess) -> None:
    """Whoever asks gets the same page, which is complete in itself: no address of another file or server."""
    answer = pool_server.request("GET", "/pool", headers={"Authorization": "none"})

    assert 200 == answer.status_code
    assert "text/html; charset=utf-8" == answer.headers["content-type"]
    for secret in (pool_server.admin_key, pool_server.api_key, *pool_server.pool["models"][0]["args"]):
        assert str(secret) not in answer.text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", answer.text)
    assert {"http://www.w3.org/2000/svg"} == set(re.findall(r"https?://[^\s\"'`]+", answer.text.replace("%20", " ")))


def test_the_browser_may_run_only_what_the_page_holds(pool_server: PoolServerProcess) -> None:
    """The policy names script and style by the hash of what is served, and allows nothing from elsewhere."""
    answer = pool_server.request("GET", "/pool")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))

    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" == policy[f"{tag}-src"]
    assert "'none'" == policy["default-src"]
    assert "'self'" == policy["connect-src"]
    assert "'none'" == policy["frame-ancestors"]
    assert "nosniff" == answer.headers["x-content-type-options"]
    assert "no-referrer" == answer.headers["referrer-policy"]


def test_a_page_that_is_known_is_not_sent_again(pool_server: PoolServerProcess) -> None:
    """The browser asks each time whether the page has changed."""
    first = pool_server.request("GET", "/pool")
    again = pool_server.request("GET", "/pool", headers={"If-None-Match": first.headers["etag"]})

    assert "no-cache" == first.headers["cache-control"]
    assert (304, b"") == (again.status_code, again.content)


# -- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip(HOW_TO_GET)
    with Browser(path) as found:
        yield found


@pytest.fixture(scope="module")
def board(browser: Browser, pool_server: PoolServerProcess) -> Page:
    """The page with the key given and two polls of a server that has worked."""
    body = {"prompt": "hello world", "max_tokens": 8, "ignore_eos": True}
    page = opened(browser, pool_server)
    for model in ("qwen2", "llama"):
        answer = pool_server.request("POST", "/v1/completions", json={"model": model, **body})
        assert 200 == answer.status_code
    page.wait("poolHistory.pools.length > 1 && poolHistory.rates().switchesPerS >= 0")
    return page


def opened(browser: Browser, server: PoolServerProcess, **view: Any) -> Page:
    page = browser.page(**view)
    page.open(f"{server.base_url}/pool")
    page.wait(KEY_FIELD)
    page.type(str(server.admin_key))
    page.press("Enter")
    page.wait(BOARD)
    return page


def test_a_wrong_key_is_said_and_the_right_one_stays_in_the_tab(
    browser: Browser, pool_server: PoolServerProcess
) -> None:
    """The server's reason is shown; the right key opens the board, is kept for the tab only and can be forgotten."""
    page = browser.page()
    page.open(f"{pool_server.base_url}/pool")
    page.wait(KEY_FIELD)
    page.type("wrong")
    page.press("Enter")
    page.wait("document.getElementById('login-error').innerText")
    assert "Missing or invalid admin key." == page.text("#login-error")
    assert page.run("sessionStorage.length") == 0

    page.type(str(pool_server.admin_key))
    page.press("Enter")
    page.wait(BOARD)
    kept = page.run("[JSON.stringify(localStorage), document.cookie, location.href]")
    assert not [where for where in kept if str(pool_server.admin_key) in where]
    assert pool_server.admin_key == page.run("Object.values(sessionStorage)[0]")
    assert {True} == {address.startswith(pool_server.base_url) for address in page.requests()}
    expected = ("401", "404")  # the wrong key; decisions, which this pool does not make
    assert not [text for text in page.complaints() if not any(f"status of {status}" in text for status in expected)]

    page.run("document.getElementById('forget').click()")
    page.wait(KEY_FIELD)
    assert page.run("sessionStorage.length") == 0


def test_the_board_shows_the_servers_figures(board: Page, pool_server: PoolServerProcess) -> None:
    """State, latencies and pages of each model are those that the server tells."""
    state = pool_server.state()["host"]
    board.run("poll()")

    assert "ready" == board.text("#link-text")
    assert "4 of 4" in board.text("#figures")
    for name in ("llama", "qwen2", "gemma3", "embed"):
        assert f"{name} on device 0 0" in board.run(row(name))
    assert f"{state['models']['qwen2']['kv_pages']}" in board.run(row("qwen2"))
    assert "no slo" in board.run(row("llama"))
    assert "%" in board.run(row("qwen2"))
    pages = board.text("#memory")
    assert f"{state['num_pages']} pages of 1.0 MiB" in pages
    assert f"{state['num_free_pages']} free" in pages
    colours = board.run(
        """(() => { const c = document.querySelector("#memory canvas"), set = new Set();
        const data = new Uint32Array(c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer);
        for (const pixel of data) set.add(pixel); return set.size; })()"""
    )
    assert colours >= 6, "four models, null blocks and free pages have colours of their own"
    assert "waiting for switches" in board.text("#turns")
    assert board.run("document.querySelector('#turns canvas').getAttribute('aria-label')").startswith("Turns of the")


def test_it_can_be_used_by_keyboard(board: Page) -> None:
    """Tab reaches every control, and Enter on a head of the table sorts by it, the other way round when repeated."""
    board.run("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        board.press("Tab")
        reached.append(board.run("document.activeElement.id || document.activeElement.innerText"))
    for wanted in ("interval", "theme", "forget", "window", "filter", "Weights", "TTFT p50 / p99"):
        assert wanted in reached

    board.run("document.querySelector('th[data-key=weights] button').focus()")
    weights = "rowsOf(view.state).find(r => r.name === NAME).weightBytes"
    names = "[...document.querySelectorAll('#models tbody b')].map(b => b.innerText)"
    for direction in ("descending", "ascending"):
        board.press("Enter")
        assert direction == board.run("document.querySelector('th[data-key=weights]').ariaSort")
        sizes = [board.run(weights.replace("NAME", json.dumps(name))) for name in board.run(names)]
        assert sizes == sorted(sizes, reverse=direction == "descending")
    board.run("document.querySelector('th[data-key=index] button').click()")


def test_a_lost_connection_is_said_and_comes_back(board: Page) -> None:
    """What is shown is marked as old while the server cannot be reached, and the page goes on by itself."""
    condition = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    board.call("Network.emulateNetworkConditions", offline=True, **condition)
    board.run("poll()")
    assert "Disconnected: the server cannot be reached. Trying again every 3 s." in board.text("#banner")
    assert board.run("document.getElementById('board').className") == "stale"

    board.call("Network.emulateNetworkConditions", offline=False, **condition)
    board.wait("document.getElementById('banner').hidden && document.getElementById('board').className === ''")
    assert "ready" == board.text("#link-text")


def test_dark_and_light_follow_the_system_until_chosen(board: Page) -> None:
    """The scheme of the system decides, a choice overrides it and is kept."""
    colour = "getComputedStyle(document.body).backgroundColor"
    light = board.run(colour)
    board.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = board.run(colour)
    assert light != dark

    board.run("(() => { const t = document.getElementById('theme'); t.value = 'light'; t.onchange({target: t}); })()")
    assert light == board.run(colour)
    assert ["light"] == board.run("Object.values(localStorage)")
    board.run("(() => { const t = document.getElementById('theme'); t.value = 'auto'; t.onchange({target: t}); })()")
    board.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])


# -- answers that this server does not give: the real state, changed on its way to the page ---------------


CHANGE = """((change, decisions) => { const real = window.fetch; window.fetch = async (url, options) => {
  const path = new URL(url, location).pathname;
  if (path === "/v1/pool/decisions" && decisions) return Response.json(decisions);
  const answer = await real(url, options);
  if (path !== "/v1/pool/state") return answer;
  const state = await answer.json();
  change(state);
  return Response.json(state);
}; view.hasDecisions = true; view.polls = 0; return poll(); })"""


@pytest.fixture
def changed(browser: Browser, pool_server: PoolServerProcess) -> Iterator[Any]:
    """Opens a page whose server's state goes through a JavaScript function first."""

    def change(function: str, *, decisions: Any = None, **view: Any) -> Page:
        page = opened(browser, pool_server, **view)
        page.run(f"{CHANGE}({function}, {json.dumps(decisions)})")
        return page

    yield change


def test_fifty_models_are_readable_on_narrow_and_wide_screens(changed: Any) -> None:
    """Every model has a row; nothing is cut off at 400 or 1280 pixels; the filter finds one of them."""
    page = changed(
        """(s) => { for (let i = 0; i < 46; i++) { const name = `model-with-a-long-name-${i}`;
        s.models[name] = {...s.models.llama};
        s.host.models[name] = {...s.host.models.qwen2, ttft_s: {p50: 12, p99: 99}};
        s.host.held_pages.kv[name] = 1; s.host.num_free_pages -= 1; } }"""
    )
    for width in (1280, 400):
        page.size(width, 900)
        page.wait(f"innerWidth === {width}")
        assert 50 == page.run("document.querySelectorAll('#models tbody tr').length")
        assert page.run("document.documentElement.scrollWidth") <= width
        cut = "[...document.querySelectorAll('#models td, #figures dd')].filter(n => n.scrollWidth > n.clientWidth + 1)"
        assert [] == page.run(f"{cut}.map(n => n.innerText)")
    page.run("document.getElementById('filter').value = 'NAME-45'; show()")
    names = page.run("[...document.querySelectorAll('#models b')].map(b => b.innerText)")
    assert ["model-with-a-long-name-45"] == names
    page.run("document.getElementById('filter').value = 'none'; show()")
    assert "No model's name contains" in page.text("#models-empty")


def test_loading_shows_phases_and_count(changed: Any) -> None:
    """Phase and seconds of the model that loads, how many are ready, and the age of the device's figures."""
    page = changed(
        """(s) => { s.progress = {done: 3, total: 4, loading: {embed: {phase: "warming up", elapsed_s: 3.5}}};
        s.ready = false; s.models.embed.state = "loading"; delete s.host.models.embed; s.host.age_s = 7; }"""
    )
    assert "loading 3 of 4" == page.text("#link-text")
    assert "Loading models: 3 of 4 ready" in page.text("#progress")
    assert "warming up, 3.50 s" in page.text("#progress")
    assert "embed warming up 3.50 s" in page.run(row("embed"))
    assert "device figures 7.00 s old: the host is building a model" in page.text("#about")


def test_a_failed_model_says_why(changed: Any) -> None:
    """In its row, and in the banner above."""
    page = changed("(s) => { s.models.embed.state = 'failed'; s.models.embed.reason = 'no file'; }")
    assert "embed failed: no file" == page.text("#banner")
    assert "embed failed no file" in page.run(row("embed"))


def test_a_pool_without_host_or_models_is_no_broken_page(changed: Any) -> None:
    """Before the host is there, and with nothing to serve, the page says so."""
    page = changed("(s) => { s.host = null; s.models = {}; s.ready = false; }")
    assert "No device yet: the engine host is starting." in page.text("#memory")
    assert "The pool has no models." in page.text("#models-empty")
    page = changed("(s) => { s.host = {error: 'it ended'}; s.ready = false; }")
    assert "The engine host does not answer: it ended" == page.text("#banner")


def test_several_hosts_and_decisions(changed: Any) -> None:
    """Each host has its map; decisions are listed, newest first; a name is text, never markup."""
    evil = "<img src=x onerror=document.title='owned'>"
    decisions = [
        {"at_s": 1.0, "action": "add", "reason": "first", "model": "llama", "host": "node-a"},
        {"at_s": 2.0, "action": "remove", "reason": evil, "model": "llama", "host": "node-b"},
    ]
    two = "(s) => { s.hosts = {'node-a': s.host, 'node-b': {...s.host}, 'node-c': {error: 'gone'}}; delete s.host; }"
    page = changed(two, decisions=decisions)
    assert 2 == page.run("document.querySelectorAll('#memory canvas').length")
    assert "node-b: 96 pages" in page.text("#memory")
    assert "node-c does not answer: gone" == page.text("#banner")
    listed = page.run("[...document.querySelectorAll('#decisions li')].map(li => li.innerText)")
    assert ["remove", "add"] == [text.split("\n")[1] for text in listed]
    assert evil in listed[0]
    assert "tokenpool" == page.run("document.title")


def test_numbers_behind_the_pictures(board: Page) -> None:
    """Blocks share out the pages without losing one; columns of the timeline hold the time of each turn."""
    memory = {"models": [{"model": "a", "weights": 1, "kv": 700, "idle": 0}], "null": 1, "free": 298, "total": 1000}
    cells = board.run(f"cellsOf({json.dumps(memory)}, 100).map(s => [s.use, s.cells])")
    assert 100 == sum(count for _, count in cells)
    assert {"weights": 1, "kv": 69, "null": 1, "free": 29} == dict(cells)

    turn = {"kind": "turn"}
    spans = [turn | {"model": "a", "start": 0.5, "end": 2.25}, turn | {"model": "b", "start": 2.25, "end": 9}]
    columns = f"coverage({json.dumps(spans)}, ['turn'], 0, 4, 4)"
    shares = board.run(f"Object.fromEntries([...{columns}].map(([k, v]) => [k, [...v]]))")
    assert {"a": [0.5, 1, 0.25, 0], "b": [0, 0, 0.75, 1]} == shares

    rows = "[{name: 'a', tokens: T, onTime: O, stepS: 0, goodput: 0}]"
    history = "const h = new History();"
    for at, tokens, on_time in ((100, 10, 10), (130, 20, 15), (170, 40, 20)):
        history += f"h.add({at}, {rows.replace('T', str(tokens), 1).replace(': O', f': {on_time}')}, []);"
    share = board.run(f"(() => {{ {history} return h.attainment({{name: 'a', tokens: 40, onTime: 20}}); }})()")
    assert {"share": 0.25, "tokens": 20, "recent": True} == share, "only the last minute counts"
