# SPDX-License-Identifier: Apache-2.0
"""Where the host copy of a model that is being built comes from: the node's store, or the checkpoint.

A copy that is there is mapped, and the checkpoint is not read: vLLM makes the model without weights, and the self-test
must give what it gave the host that filled the copy. If it does not, the model is built once more, from the checkpoint.

What a trial of reading the checkpoint again has shown is kept on disk, with a store or without: no later host tries.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm.config import VllmConfig

from tokenpool.errors import UnfitCopyError
from tokenpool.host.load.content import checkpoint_state, content_key
from tokenpool.host.load.known_proofs import KnownProofs
from tokenpool.host.load.unread_loader import UNREAD
from tokenpool.memory.copies.copy_meta import CopyMeta, read_meta
from tokenpool.memory.copies.host_copy import HostCopy
from tokenpool.memory.weights import WeightStore
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.shared_copy import SharedCopy

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
_MOST_FIXED_BYTES = 64 << 10
"""Tensors that stay, such as scales, may be made of weights; of a model with more of them nothing is mapped unread."""


class SharedWeights:
    """Of one build, which happens between `before_loading` and `adopted`; else `give_up`."""

    def __init__(
        self, name: str, config: VllmConfig, store: NodeStore | None, pause: Callable[[], None], *, may_map: bool = True
    ) -> None:
        """Without `may_map`, or a store, the copy is this host's own."""
        self._copy: HostCopy | None = None  # claimed
        self._name = name
        self._config = config
        self._pause = pause
        self._store = store
        self._proofs = KnownProofs()
        self._content = content_key(config) if may_map else None
        self._key = self._content if store is not None and may_map else None  # in the store
        self._format: str = config.load_config.load_format
        self._files = checkpoint_state(config) if self._content is not None else []
        self._said: CopyMeta | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether the weights are there and nothing is read."""
        return self._said is not None

    @property
    def known(self) -> CopyMeta | None:
        """What a trial of reading the checkpoint again has shown, in whatever process."""
        return self._proofs.of(self._content) if self._content is not None and not self.is_mapped else None

    def before_loading(self) -> None:
        """Claim the copy, and wait while another host fills it."""
        if self._key is None:
            return
        assert self._store is not None
        self._copy = copy = SharedCopy(self._store, self._key)
        began_s = time.monotonic()
        while not copy.claim():
            time.sleep(_LOOK_S)
            self._pause()
        if not copy.is_whole:
            return
        said = read_meta(copy.meta)
        if said is None or not said.outputs:
            self._take_own()
            return
        self._said = said
        self._config.load_config.load_format = UNREAD
        waited_s = time.monotonic() - began_s
        logger.info("weights are mapped, not read model=%s bytes=%d waited_s=%.2f", self._name, copy.tensor.numel(),
                    waited_s)  # fmt: skip

    def loaded(self) -> None:
        """vLLM has made the model."""
        self._config.load_config.load_format = self._format
        if self.is_mapped or self._content is None or checkpoint_state(self._config) == self._files:
            return
        logger.warning("the checkpoint has changed while it was read model=%s", self._name)
        self._take_own()
        self._content = None

    def take(self) -> HostCopy | None:
        """The copy, for whoever releases it; None = the host makes one of its own."""
        copy, self._copy = self._copy, None
        return copy

    def refuse_difference(self, outputs: str) -> None:
        """Raise UnfitCopyError unless the self-test of a mapped model gives what it gave before."""
        if self._said is not None and outputs != self._said.outputs:
            raise UnfitCopyError(self._name, "the self-test gives something else than in the host that read it")

    def adopted(self, weights: WeightStore, outputs: str, fixed_bytes: int) -> None:
        """The model works: others may have the copy. `outputs` is what the self-test gave; empty = it says nothing."""
        if self.is_mapped:
            return
        if self._key is not None:
            weights.publish(self._name, outputs if fixed_bytes <= _MOST_FIXED_BYTES else "")
        if self._content is not None and (meta := weights.meta(self._name)) is not None:
            self._proofs.keep(self._content, meta)

    def give_up(self) -> None:
        """The build has failed, or is over; what the weight store has taken stays."""
        self._config.load_config.load_format = self._format
        if (copy := self.take()) is not None:
            copy.release()

    def _take_own(self) -> None:
        self.give_up()
        self._key = None
