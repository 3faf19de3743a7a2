# SPDX-License-Identifier: Apache-2.0
"""Finds out whether a model whose weights have moved computes with them where they are now.

Code that kept a raw pointer, in a handle of C++ or anywhere that is not searched, goes on to read the memory that the
loader filled. So the model runs a few random tokens before and after: every module must give the same bytes.

Attention, and layers that keep a state, give fixed random numbers instead: without a KV cache, which there is none of
yet, their kernels give nothing, and some whatever was in memory. So what only they read is not compared, nor are
modules that these tokens do not reach, such as the encoders of a multimodal model.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_NUM_TOKENS = 4
_SEED = 7
Output = tuple[str, bytes, bytes]
"""The path of a module, and the digests of what one call of it was given and gave."""


class AdoptionCheck:
    """Runs the models of one runner, and remembers what their modules gave."""

    def __init__(
        self, model_runner: Any, models: Sequence[torch.nn.Module], layers: Iterable[torch.nn.Module] = ()
    ) -> None:
        """`layers` are those that vLLM knows to need KV or states, which need not be modules of the models."""
        self._runner = model_runner
        self._models = models
        modules = (module for model in models for module in model.modules())
        found = (module for module in (*modules, *layers) if hasattr(module, "get_attn_backend"))
        self._attention = {id(module): module for module in found}
        self._before: list[Output] = []
        self.outputs = ""
        """Digest of what the modules gave; empty while that is not known, or if they do not repeat themselves."""
        self.seconds = 0.0
        """How long all runs took."""

    def before(self) -> None:
        """Run while the weights are where the loader put them."""
        self._before = self._run()

    def first_difference(self) -> str | None:
        """Run after they have moved; the path of the first module that gives something else, None if all agree.

        What was given other inputs cannot be compared, such as what comes after memory that nobody has written, nor
        can modules that do not repeat themselves, such as kernels that add in any order: that is looked at only if
        something differs.
        """
        after = self._run()
        if after == self._before:
            self.outputs = _digest_of(after)
            return None
        again = self._run()
        for old, new, newer in zip(self._before, after, again, strict=False):
            if old[:2] == new[:2] and old != new == newer:
                return old[0]
        logger.warning("weights moved, but the model does not repeat itself: not compared")
        return None

    def alone(self) -> None:
        """Run a model that was not run before it had its weights where they are."""
        self.outputs = _digest_of(self._run())

    def _run(self) -> list[Output]:
        start = time.perf_counter()
        outputs: list[Output] = []
        with ExitStack() as stack:
            stack.enter_context(_own_random_state())
            stack.enter_context(_uncompiled(self._models))
            stack.enter_context(torch.inference_mode())
            for module in self._attention.values():
                stack.enter_context(_standing_in(module))
            for module, path in self._paths():
                if id(module) not in self._attention:
                    for handle in _record(module, path, outputs):
                        stack.callback(handle.remove)
            _dummy_step(self._runner, self._models[0], outputs)
            for draft in self._models[1:]:
                _draft_step(self._runner, draft, outputs)
        self.seconds += time.perf_counter() - start
        return outputs

    def _paths(self) -> Iterator[tuple[torch.nn.Module, str]]:
        for number, model in enumerate(self._models):
            for path, module in model.named_modules():
                yield module, f"{'draft model' if number else 'model'} {path or type(module).__name__}"


def _dummy_step(runner: Any, model: Any, outputs: list[Output]) -> None:
    """One forward pass as vLLM's own profiling does it, without KV, then the head or the pooler."""
    options = {"skip_attn": True, "skip_eplb": True, "randomize_inputs": True, "is_profile": True}
    # The second model runner takes what it does not know; the first has no `skip_attn`, which it infers.
    known = inspect.signature(runner._dummy_run).parameters
    count = min(_NUM_TOKENS, runner.max_num_tokens)
    hidden, last = runner._dummy_run(count, **{name: value for name, value in options.items() if name in known})
    outputs.append(("the hidden states", b"", _digest(hidden)))
    if runner.is_pooling_model:
        runner._dummy_pooler_run(hidden)
    elif hasattr(model, "compute_logits") and last is not None and last.numel():
        outputs.append(("the logits", _digest(last), _digest(model.compute_logits(last))))


def _draft_step(runner: Any, draft: Any, outputs: list[Output]) -> None:
    """What vLLM's profiling leaves out of a draft model: its head, and all of one that only has heads, as Medusa."""
    drafter = getattr(runner, "drafter", None) or runner.speculator  # of the first runner, and of the second
    weight = next(draft.parameters())
    hidden = torch.randn(_NUM_TOKENS, drafter.hidden_size).to(weight.device, weight.dtype)
    made = draft(hidden) if getattr(draft, "lm_heads", None) is not None else hidden
    outputs.append(("the drafts' logits", _digest(made), _digest(draft.compute_logits(made))))


def _record(module: torch.nn.Module, path: str, outputs: list[Output]) -> list[Any]:
    """Note what each call of a module is given, before it may write there, and what it gives; returns the hooks."""
    given: list[bytes] = []

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given.append(_digest([args, kwargs]))

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append((path, given.pop(), _digest(output)))

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


@contextmanager
def _standing_in(module: torch.nn.Module) -> Iterator[None]:
    """Numbers take the place of what an attention layer gives, to who calls its forward() too, as vLLM's backend for
    models of transformers does, which a hook would not see.
    """
    forward, own = module.forward, module.__dict__.get("forward")

    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = forward(*args, **kwargs)
        numbers = torch.randn(output.shape, generator=torch.Generator().manual_seed(_SEED))
        return numbers.to(output.device, output.dtype)

    module.__dict__["forward"] = stand_in
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _digest_of(outputs: Sequence[Output]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, given, gave in outputs:
        digest.update(path.encode() + b"\0" + given + gave)
    return digest.hexdigest()


def _digest(output: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(output):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.digest()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The same random numbers in each block, and those of before after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _uncompiled(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Nothing is compiled in the block: that takes long, and what is compiled must see the weights where they stay."""
    compiled = [m for model in models for m in model.modules() if getattr(m, "do_not_compile", None) is False]
    for module in compiled:
        module.do_not_compile = True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in compiled:
            module.do_not_compile = False
