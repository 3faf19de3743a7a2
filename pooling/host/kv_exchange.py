# SPDX-License-Identifier: Apache-2.0
"""Hands the KV of running requests to another host, block by block, through both hosts' tiers of cached blocks.

A request moves by being sent to another host as one that goes on where it was (resume.py). With its blocks in that
host's tier under the same hashes, vLLM's prefix cache finds them, and only the last, partial block is computed again.

    frontend ── export_kv(request) ──► engine on the source host      copies full blocks into its tier
             ◄── where, which ────────
             ── import_kv(offer) ────► engine on the target host ── kv/kv_fetch.py ──► source host, kv/kv_supply.py

On one machine the bytes go through memory that both hosts map, between machines over TLS, straight from the source's
slots into the target's. What both say to each other is in wire/kv_frames.py. The source's certificate is in the offer,
and the proof of knowing the offer is inside: so each end knows that the other one belongs to the pool.

Models whose layers keep a state hand over all blocks of a request instead, and the request ends at its source with that
(kv/request_image.py): `given_up` says so.

The hash of a block names all tokens up to its end, the adapter and the salt. vLLM's default hash is the same in every
process; with `--prefix-caching-hash-algo xxhash` set PYTHONHASHSEED, else nothing is found and all is computed again.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from tokenpool.errors import HostError, text_of
from tokenpool.host.kv import request_image
from tokenpool.host.kv.kv_fetch import Fetch, receive
from tokenpool.host.kv.kv_saving import Saving
from tokenpool.host.kv.kv_supply import Sender
from tokenpool.memory.kv_blocks import CachedBlock
from tokenpool.process.affinity import unpinned
from tokenpool.wire.kv_frames import IDLE_LIMIT_S, KV_LIMIT_S, MESSAGE_BYTES, Open, blocks_in_chunk
from tokenpool.wire.messages import Address, KeyRefusedError, Wire, connect, listen, serve
from tokenpool.wire.tls import Identity

if TYPE_CHECKING:
    from tokenpool.host.engine_host import EngineHost
    from tokenpool.host.hosted_model import HostedModel

logger = logging.getLogger(__name__)

_MOST_MOVES = 4
"""Requests whose blocks come here at a time, and go from here through shared memory; each has 16 MiB of either."""
_MOST_ENTERING = 32
"""Connections of which nobody knows yet whose they are; more are ended at once."""

Offer = dict[str, Any]
"""`addresses`, the nearest first, `access` and `certificate` of the exchange that has the blocks, `model`, their `keys`
in order, the `generation` of the source's blocks, `block_bytes`, and whether the request was `given_up`: it has to be
sent on whatever becomes of the blocks."""


class KVExchange:
    """One host's end; all methods belong to the loop's thread, what goes on beside it is in threads of their own.

    Who has the `access` of an offer can read cached blocks of this host's models: it goes to frontends and to hosts, on
    ways that are this user's alone or encrypted.
    """

    def __init__(self, host: EngineHost, path: str, node_ip: str | None = None) -> None:
        """Listen at a Unix socket, and for other machines at a free port of `node_ip`; OSError if neither can be."""
        self._host = host
        self._access = secrets.token_bytes(32)
        self._entries: dict[str, Mapping[bytes, CachedBlock]] = {}
        self._identity = Identity.new() if node_ip is not None else None
        self._entering = threading.BoundedSemaphore(_MOST_ENTERING)
        self._sharing = threading.BoundedSemaphore(_MOST_MOVES)
        self._coming = threading.BoundedSemaphore(_MOST_MOVES)
        self._addresses: list[Address] = []
        for address in (path, (node_ip, 0) if node_ip is not None else None):
            if address is not None:
                self._listen(address)
        if not self._addresses:
            raise OSError("there is no way on which KV can go to other hosts")
        self.exported_blocks = 0
        self.imported_blocks = 0

    def _listen(self, address: Address) -> None:
        try:
            listening = listen(address)
        except OSError as error:  # such as an address of the node that is on another machine, which passes all on
            logger.warning("KV does not go by %s: %s", address, error)
            return
        self._addresses.append(address if isinstance(address, str) else listening.getsockname()[:2])
        with unpinned():  # threads have the cores of who starts them, and the loop has its own
            serve(listening, self._serve, "kv")

    def add(self, hosted: HostedModel) -> None:
        """Let the model's frontends call its engine's `export_kv` and `import_kv`."""
        pool, tier = hosted.build.pool, self._host.swapper.tier
        if pool is not None and self._host.group is None:
            self._entries[hosted.name] = tier.entries_of(hosted.name)
            if request_image.can_carry(hosted.core):
                request_image.Arrivals(hosted.core, pool, tier)
        hosted.core.export_kv = lambda request_id: self._export(hosted, request_id)
        hosted.core.import_kv = lambda offer: self._import(hosted, offer)

    def snapshot(self) -> dict[str, int]:
        """KV blocks that went to other hosts' requests and came from other hosts, so far."""
        return {"exported_blocks": self.exported_blocks, "imported_blocks": self.imported_blocks}

    # -- the source ----------------------------------------------------------------------------------

    def _export(self, hosted: HostedModel, request_id: str) -> Future[Offer]:
        """Copy the full blocks of a request into the tier and say where they are; without blocks if it has none."""
        done: Future[Offer] = Future()
        pool, core, swapper = hosted.build.pool, hosted.core, self._host.swapper
        keys: list[bytes] = []
        generation = swapper.tier.generation(hosted.name)
        if pool is not None and self._host.group is None:  # else only the first rank's part of a block could be read
            core.drain_batches()
            swapper.after_step(hosted)
            if request_image.can_carry(core):
                keys = request_image.give_up(core, pool, swapper.tier, request_id)
            if not keys and pool.link is not None:

                def told(saved: Future[list[bytes]]) -> None:
                    if (error := saved.exception()) is not None:
                        done.set_exception(error)
                    else:
                        done.set_result(self._offer(hosted, saved.result(), generation))

                saving = Saving(core, pool, request_id, self._host.call, lambda: self._is_on_device(hosted))
                saving.done.add_done_callback(told)
                saving.save()
                return done
        done.set_result(self._offer(hosted, keys, generation, given_up=bool(keys)))
        return done

    def _is_on_device(self, hosted: HostedModel) -> bool:
        return self._host.models.get(hosted.name) is hosted and not self._host.swapper.is_out(hosted.name)

    def _offer(self, hosted: HostedModel, keys: list[bytes], generation: int, *, given_up: bool = False) -> Offer:
        self.exported_blocks += len(keys)
        pool = hosted.build.pool
        return {
            "addresses": self._addresses,
            "access": self._access,
            "certificate": self._identity.certificate if self._identity is not None else b"",
            "model": hosted.name,
            "keys": keys,
            "generation": generation,
            "given_up": given_up,
            "block_bytes": pool.view.block_bytes if pool is not None else 0,
        }

    def _serve(self, sock: socket.socket) -> None:
        """Send to one target; on a thread of its own."""
        is_near = sock.family == socket.AF_UNIX
        try:
            with self._entered(sock, is_near=is_near) as wire:
                opened = msgspec.msgpack.decode(wire.receive(MESSAGE_BYTES), type=Open)
                self._send(wire, opened, is_near=is_near)
        except (KeyRefusedError, HostError, OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
            logger.warning("KV is sent no further: %s", text_of(error))

    def _entered(self, sock: socket.socket, *, is_near: bool) -> Wire:
        """A connection of one that knows an offer; raises as `Wire` does, with the connection closed."""
        if is_near:  # of this user
            return self._proved(Wire(sock, IDLE_LIMIT_S))
        if self._identity is None or not self._entering.acquire(blocking=False):
            sock.close()
            raise HostError("too many peers have not proved yet that they belong to the pool")
        try:
            deadline_s = time.monotonic() + IDLE_LIMIT_S
            sock = self._identity.accept(sock, IDLE_LIMIT_S)
            return self._proved(Wire(sock, deadline_s - time.monotonic()))
        finally:
            self._entering.release()

    def _proved(self, wire: Wire) -> Wire:
        try:
            wire.ask_proof(self._access)
        except BaseException:
            wire.close()
            raise
        return wire

    def _send(self, wire: Wire, opened: Open, *, is_near: bool) -> None:
        tier = self._host.swapper.tier
        forget = partial(request_image.forget, tier, opened.model)
        sender = Sender(
            wire, opened, self._entries_for(opened), self._host.call, forget, lambda: self._is_current(opened)
        )
        shares_memory = is_near and self._sharing.acquire(blocking=False)
        try:
            sender.run(shares_memory=shares_memory)
        finally:
            if shares_memory:
                self._sharing.release()

    def _entries_for(self, opened: Open) -> Mapping[bytes, CachedBlock]:
        hosted = self._host.models.get(opened.model)
        pool = hosted.build.pool if hosted is not None else None
        if pool is None or opened.model not in self._entries:
            raise HostError(f"model {opened.model!r} has no KV on this host that could be sent")
        if opened.block_bytes != pool.view.block_bytes or not 0 < opened.chunk_blocks <= blocks_in_chunk(
            opened.block_bytes
        ):
            raise HostError(f"KV blocks of {opened.model!r} are of another size on the other host")
        if not self._is_current(opened):
            raise HostError(f"the KV of model {opened.model!r} that was offered is no more")
        return self._entries[opened.model]

    def _is_current(self, opened: Open) -> bool:
        return self._host.swapper.tier.generation(opened.model) == opened.generation

    # -- the target ----------------------------------------------------------------------------------

    def _import(self, hosted: HostedModel, offer: Offer) -> Future[int]:
        """Fetch the blocks that are missing here; the result is how many there are now. Never fails for want of room.

        HostError when the source is gone, or its blocks are of another size.
        """
        done: Future[int] = Future()
        pool, is_group = hosted.build.pool, self._host.group is not None
        if pool is None or is_group or (pool.link is None and not request_image.can_carry(hosted.core)):
            done.set_result(0)
        elif offer["block_bytes"] != pool.view.block_bytes:
            done.set_exception(HostError(f"KV blocks of {hosted.name!r} are of another size on the other host"))
        else:
            with unpinned():
                threading.Thread(target=self._fetch, args=(hosted, offer, done), name="kv-fetch", daemon=True).start()
        return done

    def _fetch(self, hosted: HostedModel, offer: Offer, done: Future[int]) -> None:
        tier = self._host.swapper.tier
        fetch = Fetch(tier, hosted.name, offer["keys"], offer["block_bytes"], offer["generation"])

        def on_loop(function: Any) -> Future[Any]:
            return self._host.call(lambda: self._if_there(hosted, function))

        def ended() -> None:
            fetch.close()
            self.imported_blocks += fetch.num_came

        try:
            if not self._coming.acquire(timeout=KV_LIMIT_S):
                raise HostError("KV of too many other requests comes to this host")
            with ExitStack() as stack:
                stack.callback(self._coming.release)
                stack.callback(lambda: self._host.call(ended).result(KV_LIMIT_S))
                receive(stack.enter_context(_connect(offer)), fetch, offer["model"], on_loop)
        except Exception as error:  # whatever it is, the request goes without
            failed = isinstance(error, HostError)
            done.set_exception(error if failed else HostError(f"the other host does not send KV: {text_of(error)}"))
        else:
            done.set_result(fetch.num_here)

    def _if_there(self, hosted: HostedModel, function: Any) -> Any:
        if self._host.models.get(hosted.name) is not hosted:
            raise HostError(f"model {hosted.name!r} is no longer on this host")
        return function()


def _connect(offer: Offer) -> Wire:
    """A proved connection to the source, at the nearest of its addresses where it answers."""
    problem: Exception = HostError("the other host listens nowhere")
    for address in offer["addresses"]:
        try:
            if isinstance(address, str):
                wire = connect(address, IDLE_LIMIT_S)
            else:
                wire = connect(tuple(address), IDLE_LIMIT_S, offer["certificate"])
        except OSError as error:  # such as the path of a socket on another machine
            problem = error
            continue
        try:
            wire.prove(offer["access"])
            return wire
        except (OSError, EOFError, KeyRefusedError) as error:
            problem = error
            wire.close()
    raise problem
