# SPDX-License-Identifier: Apache-2.0
"""The engine-core client of one model: spans every host that serves it, and loses no request when one dies."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import zmq.asyncio
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from tokenpool.policy.capacity import Role
from tokenpool.serve.client.engine_link import EngineLink, call_all
from tokenpool.serve.client.journal import Journal, JournalEntry
from tokenpool.serve.client.request_route import Route, by_prefix
from tokenpool.serve.client.suspects import SUSPECTS, Suspects
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.kv_frames import KV_LIMIT_S
from tokenpool.wire.utility_calls import REPEATED

logger = logging.getLogger(__name__)

_POLL_S, _MAX_CALLS = 0.02, 3


class PoolEngineClient(AsyncMPClient):
    """What `AsyncLLM` takes as its `engine_core`; lives on one event loop.

        client = PoolEngineClient(vllm_config)
        await client.join("host-0", addresses)   # once the model was added on that host
        client.lost("host-0")                    # its process is gone: the requests wait, or go to other hosts

    The utility calls are vLLM's; each goes to all hosts. Of `AsyncMPClient` only the construction is not used.
    """

    def __init__(
        self, vllm_config: VllmConfig, *, client_index: int = 0, route: Route = by_prefix, suspects: Suspects = SUSPECTS
    ) -> None:
        """`client_index` tells the engines which of their frontends this is."""
        self.vllm_config = vllm_config
        self.client_index = client_index
        self.engine_ranks_managed = [0]
        """vLLM counts metrics by engine; the pool shows all engines of a model as one."""
        self.resources = SimpleNamespace(engine_dead=False)
        self.journal: Journal[EngineLink] = Journal()
        self._suspects = suspects
        suspects.watch(self.journal)
        self.route = route
        """Chooses the host of each request that is sent; may be replaced at any time."""
        self.roles: dict[str, Role] = {}
        """What hosts do; those not named do everything. May be changed at any time; see `set_role`."""
        self.num_handed_over = 0
        """Requests that were moved from a host that only prefills to one that decodes."""
        self.fail: Callable[[str, Exception], None] = self._report_error
        """Ends a request, named by its id, that cannot go on; by default as one whose engine reports an error."""
        self.on_assign: Callable[[str, str], None] = lambda request_id, host: None
        """Told which host gets a request, each time that it is sent to one."""
        self.on_broken: Callable[[str], None] = partial(self.lost, blame=False)
        """Told that the connection to a host broke; its requests stay there until it is `lost`."""
        self._links: dict[str, EngineLink] = {}
        self._left, self._greeting = set[EngineLink](), set[EngineLink]()
        self._loras: dict[int, LoRARequest] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._moves: dict[str, asyncio.Task[bool]] = {}
        self._joined = asyncio.Event()
        self._context, self._loop = zmq.asyncio.Context(), asyncio.get_running_loop()
        self._knows_config = False
        self._effective_attention_block_sizes: set[int | None] = set()
        self._kv_event_sources: dict[int, Any] = {}
        self.stats_update_address = None

    # -- membership ----------------------------------------------------------------------------------

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts that take requests, in the order they joined."""
        return list(self._links)

    def load(self, host: str) -> int:
        """Unfinished requests at `host`; raises KeyError if it has not joined."""
        return self._links[host].load

    def learn(self, host: str, load: Mapping[str, Any]) -> None:
        """Take in what `host` has just told about the model: its entry in the host's answer to `load`."""
        self._links[host].learn(load)

    @property
    def num_waiting(self) -> int:
        """Unfinished requests that wait for a host to join."""
        return len(self.journal.at(None))

    async def join(self, host: str, addresses: EngineAddresses, attach: Callable[[], Any] | None = None) -> None:
        """Listen for the model's engine on `host`, `attach` it, wait for its greeting, then give it what waits.

        Attached, it forgets what it had before. Raises HostError if none greets, ValueError if it has joined already.
        """
        if host in self._links:
            raise ValueError(f"host {host!r} has joined already: it must leave or be lost first")
        link = EngineLink(
            host, self._context, addresses, self.client_index, on_outputs=self._take, on_end=self._link_ended
        )
        self._greeting.add(link)
        try:
            if attach is not None:
                await attach()
            self.lost(host, blame=False, only_broken=True)
            await link.connect()
            if not self._knows_config:
                self._apply_ready_response(link.greeting)
                self._knows_config = True
            for lora in list(self._loras.values()):
                await link.call("add_lora", lora)
        except BaseException:
            link.close()
            raise
        finally:
            self._greeting.discard(link)
        self._links[host] = link
        self._note_hosts()
        for entry in self.journal.at(None):
            self._assign(entry)

    async def leave(self, host: str) -> None:
        """Give `host` no new requests and move its running ones to other hosts; returns once it has none.

        Without another host its requests are finished first, or moved once one joins. The connection ends with the
        engine, which would wait for somebody to take its last word. Raises KeyError if the host has not joined.
        """
        link = self._links.pop(host)
        self._left.add(link)
        self._note_hosts()
        while link.load and not link.closed:
            if self._links:
                for entry in self.journal.at(link):
                    if entry.obstacle() is None:
                        await self._moving(entry.request_id, None)
            await asyncio.sleep(_POLL_S)

    def move(self, request_id: str, host: str | None = None) -> None:
        """Take a request from the engine that has it and let `host`, or the host that `route` chooses, go on with it.

        Raises KeyError for an unknown host, and for a request that has ended or cannot move.
        """
        entry = self.journal.get(request_id)
        target = None if host is None else self._links[host]
        if entry is None or entry.obstacle() is not None:
            raise KeyError(request_id)
        link = entry.place
        if link is not None:
            link.abort([entry.wire_id])
            self._take_from(link, entry)
        self._assign(entry, target)

    async def move_with_kv(self, request_id: str, host: str | None = None) -> bool:
        """`move`, with the KV computed so far; returns whether it went along.

        The request goes on where it is until its full blocks are in the other host's memory; one whose model keeps
        states ends there as its blocks are copied. If they cannot be had, it moves all the same and is computed again.
        Raises KeyError as `move` does.
        """
        entry = self.journal.get(request_id)
        source = entry.place if entry is not None else None
        if entry is None or source is None or entry.obstacle() is not None:
            raise KeyError(request_id)
        target = self._links[host] if host is not None else self._choose(entry)
        if target is None or target is source:
            return False
        with_kv, given_up = False, True  # unless its engine says that it still has it
        try:
            async with asyncio.timeout(KV_LIMIT_S):
                offer = await source.call("export_kv", entry.wire_id)
                given_up = offer["given_up"]
                with_kv = bool(offer["keys"]) and await target.call("import_kv", offer) > 0
        except Exception as error:  # of vLLM's making: the engines' words, or a connection that is gone
            logger.warning("request moves without its KV id=%s reason=%s", request_id, error)
        if self.journal.get(request_id) is entry and entry.place is source:
            if self._links.get(target.host) is target and not target.closed:
                self.move(request_id, target.host)
            elif given_up:
                self.move(request_id)
        return with_kv

    def set_role(self, host: str, role: Role) -> None:
        """Say what `host` does from now on: new requests, running ones, or both.

        Requests that a host has begun to decode stay there; those a host has only prefilled go to one that decodes as
        soon as their first token is there. Without a host that may, any host does everything.
        """
        self.roles[host] = role

    def _moving(self, request_id: str, host: str | None) -> asyncio.Task[bool]:
        """The move of a request, begun if it is not under way."""
        task = self._moves.get(request_id)
        if task is None:
            task = self._moves[request_id] = self._loop.create_task(self._move_if_possible(request_id, host))
            task.add_done_callback(lambda _: self._moves.pop(request_id, None))
        return task

    async def _move_if_possible(self, request_id: str, host: str | None) -> bool:
        try:
            return await self.move_with_kv(request_id, host)
        except KeyError:  # it has ended, or the host left
            return False

    def lost(self, host: str, *, blame: bool = True, only_broken: bool = False) -> None:
        """`host` is gone: its requests go to the other hosts, or wait until one joins. Unknown names are ignored.

        With `blame`, unless it was ended on purpose, one of its requests may be the cause: see `suspects`. With
        `only_broken` just those go whose connection broke.
        """
        for link in [*self._links.values(), *self._left, *self._greeting]:
            if link.host == host and (link.is_broken or not only_broken):
                self._lost(link, blame)

    def _link_ended(self, link: EngineLink) -> None:
        level, what = logging.WARNING if link.load else logging.INFO, "connection" if link.is_broken else "engine"
        logger.log(level, "%s ended host=%s requests=%d", what, link.host, link.load)
        if link.is_broken and self._links.get(link.host) is link:
            self._left.add(self._links.pop(link.host))
            self._note_hosts()
            self.on_broken(link.host)
        else:
            self._lost(link, blame=not link.is_broken)

    def _lost(self, link: EngineLink, blame: bool = True) -> None:
        if self._links.get(link.host) is link:
            del self._links[link.host]
        self._left.discard(link)
        self._note_hosts()
        link.close()
        stranded = self.journal.at(link)
        if blame and stranded:
            self._suspects.host_died(link.host, link.connected_s)
        for entry in stranded:
            self._take_from(link, entry)
        self._suspects.look()
        for entry in stranded:
            if entry.place is not None or self.journal.get(entry.request_id) is not entry:
                continue  # it ended together with one before
            reason = f"{entry.num_losses} engine hosts died while they had it" if entry.is_guilty else entry.obstacle()
            if reason is None:
                self._assign(entry)
            else:
                self._give_up(entry, f"The engine host died, and the request cannot be continued: {reason}.")

    def _note_hosts(self) -> None:
        (self._joined.set if self._links or self.resources.engine_dead else self._joined.clear)()

    # -- requests ------------------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to the host that `route` chooses; it waits while there is none, streamed input as `heard`."""
        self.ensure_alive()
        entry, is_new = self.journal.open(request)
        if is_new:
            entry.owner = self._suspects.owner()
            self._assign(entry)
        elif entry.place is not None:
            entry.place.add(request)
            if entry.ended:
                entry.place.load -= 1
                self.journal.close(entry.request_id)
        if request.resumable:
            await entry.heard()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Drop requests wherever they are, or where they would have waited."""
        self.abort(request_ids)

    def abort(self, request_ids: Iterable[str]) -> None:
        """`abort_requests_async`, which does not wait for anything."""
        by_link: dict[EngineLink, list[str]] = {}
        for request_id in request_ids:
            entry = self.journal.close(request_id)
            if entry is not None and entry.place is not None:
                entry.place.load -= 1
                by_link.setdefault(entry.place, []).append(entry.wire_id)
        for link, wire_ids in by_link.items():
            link.abort(wire_ids)
        self._suspects.look()

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next outputs of any host; raises EngineDeadError once the client is shut down."""
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    def _assign(self, entry: JournalEntry[EngineLink], link: EngineLink | None = None) -> None:
        link = link or self._choose(entry)
        if link is not None and self._suspects.may_go(entry, partial(self._assign, entry)):
            link.load += 1
            for message in self.journal.send(entry, link):
                link.add(message)
            self.on_assign(entry.request_id, link.host)

    def _choose(self, entry: JournalEntry[EngineLink]) -> EngineLink | None:
        """The host for a request, which waits without one: of those whose role it is, the one that `route` names."""
        unfit = Role.PREFILL if entry.delivered else Role.DECODE
        fit = [link for host, link in self._links.items() if self.roles.get(host) is not unfit]
        fit = fit or list(self._links.values())
        if len(fit) < 2:
            return fit[0] if fit else None
        return self._links[self.route(entry.request, {link.host: link.queue for link in fit})]

    def _take_from(self, link: EngineLink, entry: JournalEntry[EngineLink]) -> None:
        link.load -= 1
        self.journal.hold(entry)

    def _take(self, link: EngineLink, outputs: EngineCoreOutputs) -> None:
        outputs.outputs, ended, without_result = self.journal.take(outputs.outputs, link)
        link.load -= len(ended)
        self._suspects.look()
        for request_id in without_result:
            self.fail(request_id, GracefulHTTPError("The engine failed the request.", HTTPStatus.INTERNAL_SERVER_ERROR))
        if outputs.outputs or outputs.scheduler_stats:
            self._outputs.put_nowait(outputs)
        if self.roles.get(link.host) is Role.PREFILL:
            for output in outputs.outputs:
                self._hand_over(link, output.request_id)

    def _hand_over(self, link: EngineLink, request_id: str) -> None:
        """A request has its first token on a host that only prefills: another one is to go on with it."""
        entry = self.journal.get(request_id)
        if entry is None or entry.obstacle() is not None or request_id in self._moves:
            return
        target = self._choose(entry)
        if target is not None and target is not link and self.roles.get(target.host) is not Role.PREFILL:
            self.num_handed_over += 1
            self._moving(request_id, target.host)

    def _give_up(self, entry: JournalEntry[EngineLink], message: str) -> None:
        self.journal.close(entry.request_id)
        logger.error("request fails id=%s reason=%s", entry.request_id, message)
        self.fail(entry.request_id, GracefulHTTPError(message, HTTPStatus.BAD_GATEWAY))

    def _report_error(self, request_id: str, error: Exception) -> None:
        outputs = [EngineCoreOutput(request_id, [], finish_reason=FinishReason.ERROR)]
        self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))

    # -- utility calls -------------------------------------------------------------------------------

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        """Call all hosts, or the next to join, which is asked again what is `REPEATED`; raises the first error."""
        for _ in range(_MAX_CALLS if method in REPEATED else 1):
            await self._joined.wait()
            self.ensure_alive()
            if answers := await call_all(list(self._links.values()), method, *args):
                return answers
        raise GracefulHTTPError(f"The engine host was gone before it had answered {method}.", HTTPStatus.BAD_GATEWAY)

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        """Call all hosts and return the first one's answer."""
        return (await self.call_utility_all_async(method, *args))[0]

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on all hosts, and on those that join later."""
        added = await super().add_lora_async(lora_request)
        self._loras[lora_request.lora_int_id] = lora_request
        return added

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Unload an adapter from all hosts."""
        self._loras.pop(lora_id, None)
        return await super().remove_lora_async(lora_id)

    # -- end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections; whoever waits for outputs gets EngineDeadError. For the event loop's thread."""
        if self.resources.engine_dead:
            return
        self.resources.engine_dead = True
        self._suspects.forget(self.journal)
        self.journal.clear()
        for task in list(self._moves.values()):
            task.cancel()
        for link in [*self._links.values(), *self._left, *self._greeting]:
            link.close()
        self._links, self._left = {}, set()
        self._note_hosts()
        self._outputs.put_nowait(EngineDeadError())
        # It may wait for ZMQ's own threads, for which the event loop has no time.
        threading.Thread(target=self._context.term, name="zmq-term", daemon=True).start()

    def shutdown(self, timeout: float | None = None) -> None:
        """`close` from any thread, as AsyncLLM calls it."""
        if not self.resources.engine_dead and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.close)
