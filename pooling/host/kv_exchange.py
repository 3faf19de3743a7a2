# SPDX-License-Identifier: Apache-2.0
"""Hands the KV of running requests to another host, block by block, through both hosts' tiers of cached blocks.

A request moves by being sent to another host as one that goes on where it was (resume.py). With its blocks in that
host's tier under the same hashes, vLLM's prefix cache finds them, and only the last, partial block is computed again.

    frontend ── export_kv(request) ──► engine on the source host      copies full blocks into its tier
             ◄── where, which ────────
             ── import_kv(offer) ────► engine on the target host ── read_kv ──► source host, chunk by chunk

Models whose layers keep a state hand over all blocks of a request instead, and the request ends at its source with that
(kv/request_image.py): `given_up` says so.

The hash of a block names all tokens up to its end, the adapter and the salt. vLLM's default hash is the same in every
process; with `--prefix-caching-hash-algo xxhash` set PYTHONHASHSEED, else nothing is found and all is computed again.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tokenpool.errors import HostError
from tokenpool.host.kv import request_image
from tokenpool.wire.control import ControlServer, call_host

if TYPE_CHECKING:
    from tokenpool.host.engine_host import EngineHost
    from tokenpool.host.hosted_model import HostedModel

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
"""Bytes asked for at a time: while they are copied the host makes no step."""

Offer = dict[str, Any]
"""`address` and `access` of the exchange that has the blocks, `model`, their `keys` in order, `block_bytes`, and
whether the request was `given_up`: it has to be sent on whatever becomes of the blocks."""


class KVExchange:
    """One host's end; all methods but `import_kv`'s copying belong to the loop's thread.

    Who has the `access` of an offer can read cached blocks of this host's models: it goes to frontends and to hosts.
    """

    def __init__(self, host: EngineHost, address: str | tuple[str, int]) -> None:
        """Listen at a Unix socket's path, or at (IP address, port), 0 for any."""
        self._host = host
        self._access = secrets.token_bytes(32)
        server = ControlServer(address, self._access, host.call)
        self._address = server.address
        server.serve({"read_kv": self._read})
        self.exported_blocks = 0
        self.imported_blocks = 0

    def add(self, hosted: HostedModel) -> None:
        """Let the model's frontends call its engine's `export_kv` and `import_kv`."""
        pool = hosted.build.pool
        if pool is not None and self._host.group is None and request_image.can_carry(hosted.core):
            request_image.Arrivals(hosted.core, pool, self._host.swapper.tier)
        hosted.core.export_kv = lambda request_id: self._export(hosted, request_id)
        hosted.core.import_kv = lambda offer: self._import(hosted, offer)

    def snapshot(self) -> dict[str, int]:
        """KV blocks that went to other hosts' requests and came from other hosts, so far."""
        return {"exported_blocks": self.exported_blocks, "imported_blocks": self.imported_blocks}

    def _export(self, hosted: HostedModel, request_id: str) -> Offer:
        """Copy the full blocks of a request into the tier and say where they are; without blocks if it has none."""
        pool, core = hosted.build.pool, hosted.core
        keys: list[bytes] = []
        given_up = False
        if pool is not None and self._host.group is None:  # else only the first rank's part of a block could be read
            core.drain_batches()
            self._host.swapper.after_step(hosted)
            if request_image.can_carry(core):
                keys = request_image.give_up(core, pool, self._host.swapper.tier, request_id)
                given_up = bool(keys)
            if not keys and pool.link is not None:
                keys = _offer_cached(core, pool.link, request_id)
        self.exported_blocks += len(keys)
        return {
            "address": self._address,
            "access": self._access,
            "model": hosted.name,
            "keys": keys,
            "given_up": given_up,
            "block_bytes": pool.view.block_bytes if pool is not None else 0,
        }

    def _read(self, model: str, keys: Sequence[bytes]) -> list[tuple[bytes, int | None, bytes]]:
        """Key, tag and bytes of those blocks that are still here."""
        tier = self._host.swapper.tier
        blocks = list(tier.read(model, keys))
        request_image.forget(tier, model, list(keys))
        return blocks

    def _import(self, hosted: HostedModel, offer: Offer) -> Future[int]:
        """Fetch the blocks that are missing here; the result is how many there are now. Never fails for want of room.

        HostError when the source is gone, or its blocks are of another size.
        """
        done: Future[int] = Future()
        pool = hosted.build.pool
        if pool is None or (pool.link is None and not request_image.can_carry(hosted.core)):
            done.set_result(0)
        elif offer["block_bytes"] != pool.view.block_bytes:
            done.set_exception(HostError(f"KV blocks of {hosted.name!r} are of another size on the other host"))
        else:
            threading.Thread(target=self._fetch, args=(hosted.name, offer, done), name="kv-fetch", daemon=True).start()
        return done

    def _fetch(self, model: str, offer: Offer, done: Future[int]) -> None:
        address = offer["address"] if isinstance(offer["address"], str) else tuple(offer["address"])
        count, step = 0, max(1, _CHUNK_BYTES // offer["block_bytes"])
        try:
            for start in range(0, len(offer["keys"]), step):
                keys = offer["keys"][start : start + step]
                blocks = call_host(address, offer["access"], "read_kv", offer["model"], keys)
                count += self._host.call(partial(self._store, model, blocks)).result()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(count)

    def _store(self, model: str, blocks: Sequence[tuple[bytes, int | None, bytes]]) -> int:
        if model not in self._host.models:
            raise HostError(f"model {model!r} is no longer on this host")
        tier, pool = self._host.swapper.tier, self._host.models[model].build.pool
        assert pool is not None, "a model that asks for KV keeps some"
        stored = 0
        for key, tag, data in blocks:
            if len(data) == pool.view.block_bytes:
                stored += tier.put(model, key, tag, torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.imported_blocks += stored
        return stored


def _offer_cached(core: Any, link: Any, request_id: str) -> list[bytes]:
    """Put the full blocks of a request into the tier, which goes on; returns their keys."""
    keys: list[bytes] = []
    for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
        blocks = [b for b in manager.req_to_blocks.get(request_id, ()) if b.block_hash is not None]
        link.offer(blocks)
        keys += [bytes(b.block_hash) for b in blocks if b.block_hash in link.stored]
    return keys
