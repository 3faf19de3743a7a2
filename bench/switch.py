# SPDX-License-Identifier: Apache-2.0
"""What a switch between two models costs: seconds in which nothing steps, and bytes, for models of several sizes.

An engine host in this process, one compute thread; every model has one request that decodes all the time. Three cases
for each size of models:

    blocking  two models; device memory for the weights of one and the KV of both. Nothing is prefetched.
    with_kv   two models; device memory for the weights and the KV of one: KV moves too.
    prefetch  three models in a circle; device memory for the weights of two and the KV of all. While one decodes, the
              weights of the next come in on the side thread, in the place of the third's.

    memcpy_ratio        `blocking`: visible seconds / seconds of a memmove of as many bytes into freshly mapped pages;
                        worst median of the sizes from 16 MiB on. Below that, fixed costs are most of a switch: they
                        are in the JSON, as `fixed_s` and by size.
    visible_steps       `prefetch`: visible seconds / median step of the model that runs after; worst of all sizes
    weight_d2h_bytes    bytes of weights copied from the device to the host in all cases, as counted at the device; 0

Timer boundaries. Visible, blocking: from the policy's decision to the begin of the target's first step, on the loop's
thread; pages of the victim are unmapped and the target's mapped in that time. Visible, prefetch: what the loop takes
between steps, from the decision to prefetch to the target's first step, beyond what it takes there without a switch;
with that, unmapping and mapping for the prefetch count. Memmove: the call alone, not the mapping. Between any two
timed copies a model makes steps, so that what they copy has left the caches as far as it does in a switch.

Not to be concluded: anything about a GPU, where copies cross a bus at other speeds and mapping costs other times. The
"device" here is host memory. The first touch of a page is most of the copy into fresh pages: compare `memcpy_warm_s`.
On two cores the side thread has one for itself; with more compute threads than that leaves, `step_ratio` is higher.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, sized_models

RATIO_FROM_MIB = 16
STEPS = 4  # between two timed copies
WARM_UP = 4  # switches that are not counted
STEPS_PER_SWITCH = 10  # of one model, at most: the length of its request


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated values of one thing."""

    median: float
    low: float
    """The lower quartile."""
    high: float
    """The upper quartile."""
    values: list[float]


@dataclass(frozen=True, slots=True)
class Case:
    """Switches of one case; `moved` and `planned` are bytes by kind over all of them."""

    visible_s: Spread
    step_s: float
    """Median step in which no weights were copied."""
    moved: dict[str, int]
    planned: dict[str, int] | None
    """By the host's plans; None where the host plans ahead."""
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """All cases of models of one size."""

    mib: float
    weight_bytes: int
    page_bytes: int
    memcpy_ratio: float
    """Median over switches of visible / memmove into fresh pages, both of the same turn."""
    memcpy_ratio_warm: float
    """The same with a destination that was written before."""
    fixed_s: float
    """Median of visible - memmove into fresh pages."""
    visible_steps: float
    step_ratio: float | None
    """`prefetch`: median of the steps that began while weights were copied / median of the others; None if the copies
    are so short that no step began in one."""
    blocking: Case
    with_kv: Case
    prefetch: Case


@dataclass(frozen=True, slots=True)
class Switch:
    """Results; see the module."""

    memcpy_ratio: float
    visible_steps: float
    weight_d2h_bytes: int
    memcpy_ratio_of: str
    better: dict[str, str]
    sizes: list[Size]


def run(*, sizes: Sequence[float], switches: int, seed: int, start_limit_s: float, logs: Path | None) -> Switch:
    """Measure every size with `switches` switches per case."""
    del start_limit_s, logs  # there is no server
    measured = []
    for mib in sizes:
        with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
            paths = sized_models.make_all(Path(folder), dict.fromkeys("abc", mib))
            measured.append(_measure_size(mib, paths, switches, seed))
        done = measured[-1]
        common.progress(f"{mib:g} MiB: ratio {done.memcpy_ratio:.2f}, {done.visible_steps:.2f} steps visible")
    large = [size for size in measured if size.mib >= RATIO_FROM_MIB] or measured
    cases = [case for size in measured for case in (size.blocking, size.with_kv, size.prefetch)]
    return Switch(
        memcpy_ratio=max(size.memcpy_ratio for size in large),
        visible_steps=max(size.visible_steps for size in measured),
        weight_d2h_bytes=sum(case.moved["weights_to_host"] for case in cases),
        memcpy_ratio_of=f"the worst of {', '.join(f'{size.mib:g} MiB' for size in large)}",
        better={"memcpy_ratio": "lower", "visible_steps": "lower", "weight_d2h_bytes": "lower"},
        sizes=measured,
    )


def _measure_size(mib: float, paths: dict[str, Path], switches: int, seed: int) -> Size:
    page = 256 << 10 if mib < 16 else 1 << 20 if mib <= 64 else 4 << 20  # a few KV blocks of the size
    pair = {name: paths[name] for name in "ab"}
    fresh, warm = [], []
    with closing(_make_rig(pair, mib, page, 1, 2, switches, seed)) as rig:
        weight_bytes = rig.host.weights.bytes_of("a")
        blocking = _blocking(rig, switches, _Memmove(rig, fresh, warm))
    with closing(_make_rig(pair, mib, page, 1, 1, switches, seed)) as rig:
        with_kv = _blocking(rig, switches, lambda name: None)
    with closing(_make_rig(paths, mib, page, 2, 3, switches, seed)) as rig:
        prefetch = _prefetched(rig, switches)
    gc.collect()
    beside_s = prefetch.extra["step_copying_s"]
    visible = blocking.visible_s.values
    return Size(
        mib=mib,
        weight_bytes=weight_bytes,
        page_bytes=page,
        memcpy_ratio=statistics.median(a / b for a, b in zip(visible, fresh[WARM_UP:], strict=True)),
        memcpy_ratio_warm=statistics.median(a / b for a, b in zip(visible, warm[WARM_UP:], strict=True)),
        fixed_s=statistics.median(a - b for a, b in zip(visible, fresh[WARM_UP:], strict=True)),
        visible_steps=prefetch.visible_s.median / prefetch.step_s,
        step_ratio=beside_s / prefetch.step_s if beside_s else None,
        blocking=_with(blocking, memcpy_fresh_s=_spread(fresh[WARM_UP:]), memcpy_warm_s=_spread(warm[WARM_UP:])),
        with_kv=with_kv,
        prefetch=prefetch,
    )


def _make_rig(paths: dict[str, Path], mib: float, page: int, weights: int, kv: int, switches: int, seed: int) -> Any:
    """A host with device memory for the weights of `weights` models, the KV of `kv` of them, and null blocks.

    What a model may need for KV is promised to it while it is not away, so that weights cannot take it.
    """
    from bench.parts.switch_rig import BLOCK_TOKENS, PROMPT_TOKENS, Rig

    steps = STEPS_PER_SWITCH * (WARM_UP + switches)
    block = BLOCK_TOKENS * sized_models.kv_bytes_per_token(mib)
    blocks = -(-(PROMPT_TOKENS + steps) // BLOCK_TOKENS) + 1
    kv_pages = -(-blocks // (page // block - 1))  # a block that crosses the border of two pages is not used
    if kv < len(paths):
        kv_pages += 4  # more than rounding leaves over, so that KV must go
    weight_pages = -(-int((mib * 1.02 + 0.5) * (1 << 20)) // page)  # and 0.25 MiB for the rotary tables
    null_pages = -(-len(paths) * block // page) + 1
    return Rig(paths, weights * weight_pages + kv * kv_pages + null_pages, page, kv_pages, steps, seed)


class _Memmove:
    """Times plain copies of a model's weights' size: into pages never touched, and into others."""

    def __init__(self, rig: Any, fresh: list[float], warm: list[float]) -> None:
        self._rig, self._fresh, self._warm = rig, fresh, warm
        self._device = rig.host.arena.device
        self._sources = {}
        for name in rig.host.models:  # one each, so that none is read more often than a model's host copy
            source = self._device.host_buffer(rig.host.weights.bytes_of(name))
            self._sources[name] = source.fill_(1)
        self._target = self._device.host_buffer(source.numel()).fill_(0)

    def __call__(self, name: str) -> None:
        """Copy as many bytes as the switch to `name` will, both ways, with steps of the present model between."""
        source, present = self._sources[name], self._rig.script.run
        address = self._device.reserve(source.numel())
        self._device.map_zeroed(address, source.numel())
        self._fresh.append(_timed_memmove(address, source))
        self._device.release(address, source.numel())
        self._rig.turn(present, STEPS)
        self._warm.append(_timed_memmove(self._target.data_ptr(), source))
        self._rig.turn(present, STEPS)


def _timed_memmove(address: int, source: Any) -> float:
    pointer, nbytes = source.data_ptr(), source.numel()
    start = time.perf_counter()
    ctypes.memmove(address, pointer, nbytes)
    return time.perf_counter() - start


def _blocking(rig: Any, switches: int, before: Callable[[str], None]) -> Case:
    """Switch to and fro; `before` is called with the target before each switch."""
    visible, planned, start = [], dict.fromkeys(rig.moved(), 0), rig.moved()
    for number in range(WARM_UP + switches):
        target = "ab"[number % 2]
        if number == WARM_UP:
            visible, planned, start = [], dict.fromkeys(planned, 0), rig.moved()
        rig.turn("ba"[number % 2], STEPS)
        before(target)
        step = rig.turn(target, 1)
        visible.append(step.start_s - step.decided_s)
        for kind, nbytes in rig.host.residency.last_plan.bytes_by_kind.items():
            if kind.value in planned:
                planned[kind.value] += nbytes
    return Case(_spread(visible), _median_step(rig), _difference(start, rig.moved()), planned, {})


def _prefetched(rig: Any, switches: int) -> Case:
    """Go round the circle; each model steps until the next one's weights are there, and then some steps more."""
    names, visible, last, hidden = "abc", [], [], []
    rig.turn("a", STEPS)
    rig.turn("b", STEPS)  # the last two of the circle are resident
    start = rig.moved()
    for number in range(WARM_UP + switches):
        if number == WARM_UP:
            visible, last, hidden, start = [], [], [], rig.moved()
        present, target, third = (names[(number + k) % 3] for k in (1, 2, 0))
        rig.turn(present, STEPS)
        usual_s = statistics.median(step.gap_s for step in rig.steps if not step.copying)
        first = len(rig.steps)
        rig.script.prefetch, rig.script.spare = target, third
        while not rig.is_resident(target):
            rig.step()
        hidden.append(len(rig.steps) - first)
        rig.turn(present, 1)
        step = rig.turn(target, 1)
        last.append(step.start_s - step.decided_s)
        visible.append(sum(step.gap_s - usual_s for step in rig.steps[first:]))
    copying = [step.seconds for step in rig.steps if step.copying]
    extra = {
        "switch_only_s": _spread(last),
        "steps_beside_the_copy": _spread(hidden),
        "step_copying_s": statistics.median(copying) if copying else None,
        "prefetches": rig.host.residency.counters.prefetches,
    }
    return Case(_spread(visible), _median_step(rig), _difference(start, rig.moved()), None, extra)


def _median_step(rig: Any) -> float:
    return statistics.median(step.seconds for step in rig.steps if not step.copying)


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {kind: after[kind] - before[kind] for kind in after}


def _spread(values: Sequence[float]) -> Spread:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, list(values))


def _with(case: Case, **extra: Any) -> Case:
    return Case(case.visible_s, case.step_s, case.moved, case.planned, {**case.extra, **extra})


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--sizes", type=float, nargs="+", default=[1, 16, 256], help="MiB of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--switches", type=int, default=24, help="counted ones per case, 2 to 80 (default: %(default)s)"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common.report("switch", run, parser.parse_args(), ["memcpy_ratio", "visible_steps", "weight_d2h_bytes"])
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


if __name__ == "__main__":
    main()
