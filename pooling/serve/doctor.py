# SPDX-License-Identifier: Apache-2.0
"""`tokenpool doctor`: what is installed, which patches fit, and whether a given pool would start."""

from __future__ import annotations

import sys

from tokenpool.errors import PoolError


def doctor(words: list[str]) -> int:
    """Print the report; returns 0 when everything fits, 1 when something does not."""
    ok = _report_versions()
    ok &= _report_patches()
    if words:
        ok &= _report_pool(words)
    print("ok" if ok else "not ok")
    return 0 if ok else 1


def _report_versions() -> bool:
    import psutil
    import torch
    from vllm.platforms import current_platform

    import tokenpool
    from tokenpool.patches import vllm_version
    from tokenpool.units import format_bytes

    print(f"tokenpool {tokenpool.__version__}, python {sys.version.split()[0]}")
    print(f"vllm {vllm_version()}, torch {torch.__version__}")
    print(f"device {current_platform.device_name}: {'supported' if current_platform.is_cpu() else 'not supported yet'}")
    memory = psutil.virtual_memory()
    print(f"host memory {format_bytes(memory.total)}, available {format_bytes(memory.available)}")
    return current_platform.is_cpu()


def _report_patches() -> bool:
    from tokenpool.patches import PATCHES, vllm_version

    statuses = PATCHES.status(vllm_version())
    for status in statuses:
        kind = "replaces" if status.sites else "relies on"
        print(f"patch {status.name}: {kind} {status.target}, sha256 {status.found[:16]}, {_fit(status.ok)}")
        if not status.ok:
            print(f"  expected {status.expected or 'nothing: this vLLM version is unknown'}")
    return all(status.ok for status in statuses)


def _fit(ok: bool) -> str:
    return "fits" if ok else "DIFFERS"


def _report_pool(words: list[str]) -> bool:
    from tokenpool.serve.command_line import pool_from_command_line
    from tokenpool.serve.launch_plan import plan_pool
    from tokenpool.serve.run import describe_plan

    try:
        print(describe_plan(*plan_pool(pool_from_command_line(words))))
    except PoolError as error:
        print(f"refused: {error}")
        return False
    return True
