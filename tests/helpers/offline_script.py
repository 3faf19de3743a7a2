# SPDX-License-Identifier: Apache-2.0
"""What a user's script does with `PooledLLM`; its one argument is a task as JSON, see tests/cli/test_offline.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from tokenpool import PooledLLM

MEMORY: dict[str, Any] = {
    "device_memory": "64MiB",
    "host_memory": "64MiB",
    "page_size": "1MiB",
    "weights": "movable",
}


def _error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def main(task: dict[str, Any]) -> None:
    """Use a pool, misuse it, kill its host, and write down what was seen."""
    greedy = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True)
    errors = {
        "unknown setting": _error_of(lambda: PooledLLM(task["models"], device_memry="1GiB")),
        "settings beside a file": _error_of(lambda: PooledLLM("pool.yaml", device_memory="1GiB")),
    }
    with PooledLLM(task["models"], **MEMORY) as pool:
        prompts = {name: [{"prompt_token_ids": ids} for ids in given] for name, given in task["prompts"].items()}
        outputs = pool.generate(prompts, greedy)
        errors["unknown model"] = _error_of(lambda: pool.generate({"nobody": ["?"]}))
        name = next(iter(pool))
        chat = pool[name].chat([{"role": "user", "content": "hello"}], greedy, use_tqdm=False)
        seen = {
            "outputs": {
                model: [{"token_ids": list(o.outputs[0].token_ids), "text": o.outputs[0].text} for o in done]
                for model, done in outputs.items()
            },
            "chat_tokens": len(chat[0].outputs[0].token_ids),
            "state": pool.state(),
            "errors": {attempt: str(error) for attempt, error in errors.items()},
        }
        endless = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        killer = threading.Timer(0.2, os.kill, (pool._host.pid, signal.SIGKILL))
        killer.start()
        died = _error_of(lambda: [pool.generate(prompts, endless) for _ in range(1000)])
        seen["after_kill"] = [type(died).__name__, type(_error_of(pool.state)).__name__]
    Path(task["out"]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
