# SPDX-License-Identifier: Apache-2.0
"""How long a prefill and a switch take for cached KV blocks that leave the device for the host, over a slow link.

An engine host in this process, one compute thread, copies held to `--link-mib-s`. Two models with one request each that
decodes all the time; the weights of both fit, the KV of one beside little of the other. Prompts without a common prefix
come and end, so that all free pages hold cached blocks. Everything is done twice, with the prefix cache and without:

    stall_prefill_ms   median step with a prefill that takes the place of cached blocks, less that without a cache
    stall_switch_ms    the same of a switch to the other model, whose pages hold cached blocks of this one: from the
                       policy's decision to the begin of the target's first step
    hit_ms             median step with a prompt whose blocks come back from the host, with a cache
    saved_share        of the blocks that were cached in all, the share that went to the host

`--before FILE` puts the values of an earlier result into this one, as `before`.

Not to be concluded: anything about a GPU, where a stream waits for what is waited for on the host here. The link is a
thread that sleeps; what it takes of the other core is in both arms.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
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
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class CachedKV:
    """Medians, and every value in ms; see the module."""

    stall_prefill_ms: float
    stall_switch_ms: float
    hit_ms: float
    saved_share: float
    prompt_mib: float
    """KV of one prompt."""
    better: dict[str, str]
    rounds: dict[str, dict[str, list[float]]]
    before: dict[str, Any] | None


def run(
    *, link_mib_s: float, rounds: int, before: Path | None, seed: int, start_limit_s: float, logs: Path | None
) -> CachedKV:
    """Measure `rounds` prefills and as many switches, with a prefix cache and without."""
    del start_limit_s, logs  # there is no server
    with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
        paths = sized_models.make_all(Path(folder), dict.fromkeys("ab", MIB))
        noted, saved_share = {}, 0.0
        for caching in (False, True):
            arm = _Arm(paths, int(link_mib_s * (1 << 20)), rounds, seed, caching)
            with closing(arm.rig):
                noted["with_cache" if caching else "without"] = arm.measure(rounds)
                saved_share = arm.saved_share
    medians = {arm: {key: statistics.median(values) for key, values in kinds.items()} for arm, kinds in noted.items()}
    cached, plain = medians["with_cache"], medians["without"]
    return CachedKV(
        stall_prefill_ms=cached["prefill_ms"] - plain["prefill_ms"],
        stall_switch_ms=cached["switch_ms"] - plain["switch_ms"],
        hit_ms=cached["again_ms"],
        saved_share=saved_share,
        prompt_mib=PROMPT * sized_models.kv_bytes_per_token(MIB) / (1 << 20),
        better=dict.fromkeys(("stall_prefill_ms", "stall_switch_ms", "hit_ms"), "lower") | {"saved_share": "higher"},
        rounds=noted,
        before=json.loads(before.read_text())["values"] if before else None,
    )


class _Arm:
    """Two models, with or without a prefix cache."""

    def __init__(self, paths: dict[str, Path], link: int, rounds: int, seed: int, caching: bool) -> None:
        from bench.parts.switch_rig import BLOCK_TOKENS, Rig

        steps = (2 * rounds + WARM_UP + 4) * (TOKENS + 4)
        block = BLOCK_TOKENS * sized_models.kv_bytes_per_token(MIB)
        kv_pages = -(-(steps + 128 + 4 * PROMPT) // BLOCK_TOKENS // (PAGE // block - 1)) + 2
        weight_pages = -(-int((MIB * 1.02 + 0.5) * (1 << 20)) // PAGE)
        flags = {"enable_prefix_caching": caching, "host_memory": 1 << 30, "link_bytes_per_s": link}
        self.rig = Rig(paths, 2 * weight_pages + kv_pages + 4, PAGE, kv_pages - 2, steps + PROMPT, seed, **flags)
        self._prompts = iter(common.random_prompts(seed + 1, 4 * rounds + 20, PROMPT))
        self._block, self._number, self._cached = block, 0, 0

    @property
    def saved_share(self) -> float:
        """Blocks that went to the host / blocks that were cached."""
        return self.rig.moved()["cached_kv_out"] / self._block / self._cached if self._cached else 0.0

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Times in ms by what was done."""
        prefill, again, switch = [], [], []
        for _ in range(WARM_UP + rounds):
            prompt = next(self._prompts)
            prefill.append(self._serve("a", prompt))
        for _ in range(rounds // 2):  # what was lost longest ago is on the host, if anywhere
            again.append(self._serve("a", prompt))
            for _ in range(2):
                self._serve("a", next(self._prompts))
        for number in range(WARM_UP + rounds):
            model = "ba"[number % 2]
            step = self.rig.turn(model, 2)
            switch.append((step.start_s - step.decided_s) * 1e3)
            self._serve(model, next(self._prompts))
        return {"prefill_ms": prefill[WARM_UP:], "again_ms": again, "switch_ms": switch[WARM_UP:]}

    def _serve(self, model: str, prompt: list[int]) -> float:
        """One more request beside the one that runs; returns the ms of the step with its prompt."""
        self._number += 1
        self._cached += PROMPT // 32
        self.rig.submit(model, prompt, TOKENS, f"{model}-{self._number}")
        first = self.rig.turn(model, 1)
        self.rig.turn(model, TOKENS + 1)
        return first.seconds * 1e3


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--link-mib-s", type=float, default=100, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--before", type=Path, help="result of an earlier commit")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keys = ["stall_prefill_ms", "stall_switch_ms", "hit_ms", "saved_share"]
    common.report("cached_kv", run, parser.parse_args(), keys)
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


if __name__ == "__main__":
    main()
