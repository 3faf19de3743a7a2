# SPDX-License-Identifier: Apache-2.0
"""How long a prefill and a switch take for cached KV blocks that leave the device for the host, over a slow link.

An engine host in this process, one compute thread, copies held to `--link-mib-s`. Two models with one request each that
decodes all the time; the weights of both fit, the KV of one beside little of the other. Prompts without a common prefix
come and end, so that all free pages hold cached blocks. Three arms, each `--repeats` times in another order, every time
on a new host:

    off       without a prefix cache: nothing is copied
    before    each block is copied by itself and waited for, as the host did at first; nothing is copied ahead
    after     what the host does: one batch for each call, begun and not waited for, and blocks that are copied ahead

    stall_prefill_ms   median pass of the loop with a prefill that takes the place of cached blocks, less that of `off`
    stall_switch_ms    the same of a switch to the other model, whose pages hold cached blocks of this one: from the
                       policy's decision to the begin of the target's first step
    hit_ms             median pass of the loop with a prompt whose blocks come back from the host
    decode_ms          median of the passes that follow a prefill: what is copied ahead is begun there
    saved_share        of the blocks that were cached in all, the share that went to the host

Not to be concluded: anything about a GPU, where a stream waits for what is waited for on the host here. The link is a
thread that sleeps; what it takes of the other core is in both arms.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common, sized_models

MIB = 16
PAGE = 512 << 10
PROMPT, TOKENS = 512, 8
WARM_UP = 6
"""Rounds of each arm that are left out: after them no page is free that never held a cached block."""
ARMS = ("off", "before", "after")


@dataclass(frozen=True, slots=True)
class CachedKV:
    """Medians by arm, and every value in ms; see the module."""

    stall_prefill_ms: dict[str, float]
    stall_switch_ms: dict[str, float]
    hit_ms: dict[str, float]
    decode_ms: dict[str, float]
    saved_share: dict[str, float]
    prompt_mib: float
    """KV of one prompt."""
    better: dict[str, str]
    rounds: dict[str, dict[str, list[float]]]


def run(
    *, link_mib_s: float, rounds: int, repeats: int, seed: int, start_limit_s: float, logs: Path | None
) -> CachedKV:
    """Measure `rounds` prefills, hits and switches in each of `repeats` hosts of each arm."""
    del start_limit_s, logs  # there is no server
    noted: dict[str, dict[str, list[float]]] = {arm: defaultdict(list) for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
        paths = sized_models.make_all(Path(folder), dict.fromkeys("ab", MIB))
        for number in range(repeats):
            for arm in ARMS[number % 3 :] + ARMS[: number % 3]:
                host = _Host(paths, int(link_mib_s * (1 << 20)), rounds, seed + number, arm)
                with closing(host.rig):
                    for kind, values in host.measure(rounds).items():
                        noted[arm][kind] += values
                common.progress(f"{arm}, {number + 1} of {repeats}")
    median = {arm: {kind: statistics.median(values) for kind, values in kinds.items()} for arm, kinds in noted.items()}
    beyond_off = {
        kind: {arm: median[arm][kind] - median["off"][kind] for arm in ARMS[1:]} for kind in ("prefill_ms", "switch_ms")
    }
    lower = ("stall_prefill_ms", "stall_switch_ms", "hit_ms", "decode_ms")
    return CachedKV(
        stall_prefill_ms=beyond_off["prefill_ms"],
        stall_switch_ms=beyond_off["switch_ms"],
        hit_ms={arm: median[arm]["hit_ms"] for arm in ARMS[1:]},
        decode_ms={arm: median[arm]["decode_ms"] for arm in ARMS},
        saved_share={arm: median[arm]["saved_share"] for arm in ARMS[1:]},
        prompt_mib=PROMPT * sized_models.kv_bytes_per_token(MIB) / (1 << 20),
        better=dict.fromkeys(lower, "lower") | {"saved_share": "higher"},
        rounds={arm: dict(kinds) for arm, kinds in noted.items()},
    )


class _Host:
    """Two models of one arm."""

    def __init__(self, paths: dict[str, Path], link: int, rounds: int, seed: int, arm: str) -> None:
        from bench.parts.switch_rig import BLOCK_TOKENS, Rig

        steps = (5 * rounds + 2 * WARM_UP + 4) * (TOKENS + 4)
        block = BLOCK_TOKENS * sized_models.kv_bytes_per_token(MIB)
        kv_pages = -(-(steps + 128 + 4 * PROMPT) // BLOCK_TOKENS // (PAGE // block - 1)) + 2
        weight_pages = -(-int((MIB * 1.02 + 0.5) * (1 << 20)) // PAGE)
        flags = {"enable_prefix_caching": arm != "off", "host_memory": 1 << 30, "link_bytes_per_s": link}
        self.rig = Rig(paths, 2 * weight_pages + kv_pages + 4, PAGE, kv_pages - 2, steps + PROMPT, seed, **flags)
        if arm == "before":
            _copy_each(self.rig)
        self._prompts = iter(common.random_prompts(seed + 100, 5 * rounds + 2 * WARM_UP, PROMPT))
        self._block, self._number, self._cached = block, 0, 0
        self._noted: dict[str, list[float]] = defaultdict(list)

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Times in ms by what was done."""
        fresh = [next(self._prompts) for _ in range(WARM_UP + rounds)]
        for number, prompt in enumerate(fresh):
            self._serve("a", prompt, "prefill_ms" if number >= WARM_UP else "")
        for _ in range(rounds):  # what was lost longest ago is on the host, if anywhere
            self._serve("a", fresh[-1], "hit_ms")
            for _ in range(2):
                self._serve("a", next(self._prompts))
        for number in range(WARM_UP + rounds):
            model = "ba"[number % 2]
            step = self.rig.turn(model, 2)
            if number >= WARM_UP:
                self._noted["switch_ms"].append((step.start_s - step.decided_s) * 1e3)
            self._serve(model, next(self._prompts))
        if self._cached:
            self._noted["saved_share"] = [self.rig.moved()["cached_kv_out"] / self._block / self._cached]
        return self._noted

    def _serve(self, model: str, prompt: list[int], kind: str = "") -> None:
        """One more request beside the one that runs; notes the pass with its prompt, and those that follow."""
        self._number += 1
        self._cached += PROMPT // 32
        self.rig.submit(model, prompt, TOKENS, f"{model}-{self._number}")
        passes = [self._pass_ms(model) for _ in range(TOKENS + 2)]
        if kind:
            self._noted[kind].append(passes[0])
        if kind == "prefill_ms":
            self._noted["decode_ms"] += passes[1:]

    def _pass_ms(self, model: str) -> float:
        start = time.perf_counter()
        self.rig.turn(model, 1)
        return (time.perf_counter() - start) * 1e3


def _copy_each(rig: Any) -> None:
    """Let the tier copy block for block and wait for each; nobody copies ahead."""
    tier = rig.host.swapper.tier
    offer, begin_load = tier.offer, tier.begin_load

    def offer_each(model: str, blocks: Iterable[Any], block_bytes: int, *, most_bytes: int | None = None) -> None:
        del most_bytes
        for block in blocks:
            copies = offer(model, [block], block_bytes)
            if copies is not None:
                copies.wait()

    def load_each(model: str, places: Mapping[bytes, int]) -> Any:
        copies = None
        for key, address in places.items():
            copies = begin_load(model, {key: address})
            copies.wait()
        return copies

    tier.offer, tier.begin_load = offer_each, load_each
    rig.host.swapper.copy_ahead = lambda: None


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--link-mib-s", type=float, default=100, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="in each host (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="hosts of each arm (default: %(default)s)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.setswitchinterval(0.0005)  # as in a host: its threads wait so long for the interpreter
    stalls = [f"{kind}_{arm}" for kind in ("stall_prefill_ms", "stall_switch_ms", "hit_ms") for arm in ARMS[1:]]
    keys = [*stalls, *(f"decode_ms_{arm}" for arm in ARMS), *(f"saved_share_{arm}" for arm in ARMS[1:])]
    common.report("cached_kv", run, parser.parse_args(), keys)
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


if __name__ == "__main__":
    main()
