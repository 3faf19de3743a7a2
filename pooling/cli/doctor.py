# SPDX-License-Identifier: Apache-2.0
"""`tokenpool doctor`: what is installed, which patches fit, and whether a given pool would start."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata

from tokenpool.cli.command_line import pool_from_command_line
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_flags import add_models, add_pool_flags
from tokenpool.errors import PoolError

_USAGE = "tokenpool doctor [pool.yaml | MODEL ...] [flags of tokenpool serve]"
_DESCRIPTION = "Print what is found: versions, device, memory, and whether each patch fits the installed vLLM."
_EPILOG = "Of a pool it prints what `tokenpool validate` does, too. The exit status is 1 when something does not fit."

_MEDIA_PACKAGES = ("torchvision", "opencv-python-headless", "soundfile", "av")


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool doctor` to the tree."""
    parser = commands.add_parser(
        "doctor", help=summary, usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG, leaves_words=True
    )
    add_models(parser)
    add_pool_flags(parser, without=("--cluster",))


def run(options: argparse.Namespace) -> int:
    """Print the report; returns 0 when everything fits, 1 when something does not."""
    ok = _report_versions()
    ok &= _report_patches()
    if options.words:
        ok &= _report_pool(options.words)
    print("ok" if ok else "not ok")
    return 0 if ok else 1


def _report_versions() -> bool:
    import torch

    import tokenpool
    from tokenpool.memory.system_memory import system_memory
    from tokenpool.patches import vllm_version
    from tokenpool.units import format_bytes

    print(f"tokenpool {tokenpool.__version__}, python {sys.version.split()[0]}")
    print(f"vllm {vllm_version()}, torch {torch.__version__}")
    print(f"for images, videos and sounds: {', '.join(_version_of(name) for name in _MEDIA_PACKAGES)}")
    device_ok = _report_device()
    memory = system_memory()
    limited = " (the limit of a cgroup)" if memory.is_limited else ""
    print(f"host memory {format_bytes(memory.total_bytes)}{limited}, available {format_bytes(memory.available_bytes)}")
    return device_ok


def _version_of(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} missing"


def _report_device() -> bool:
    from vllm.platforms import current_platform

    from tokenpool.memory.devices.cuda_driver import CUDA_WARNING, load_driver_api
    from tokenpool.memory.devices.nvml import NO_GPU, read_gpu, uuid_of_gpu
    from tokenpool.units import format_bytes

    if current_platform.is_unspecified():
        print(f"device: {NO_GPU}")
        return False
    if not current_platform.is_cuda():
        is_cpu = current_platform.is_cpu()
        print(f"device {current_platform.device_name}: {'supported' if is_cpu else 'not supported'}")
        return is_cpu
    try:
        status = read_gpu(uuid_of_gpu(current_platform))
        load_driver_api()
    except PoolError as error:
        print(f"device cuda: {error}")
        return False
    busy = "load unknown" if status.busy_frac is None else f"{status.busy_frac:.0%} busy"
    memory = f"{format_bytes(status.free_bytes)} of {format_bytes(status.total_bytes)} free"
    split = "split by MIG: give device_memory in bytes" if status.is_split else ""
    print("; ".join(filter(None, [f"device cuda: {status.name}, {memory}, {busy}", split, status.describe_foreign()])))
    print(f"  {CUDA_WARNING}")
    return True


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
    from tokenpool.serve.launch.launch_plan import describe_plan, plan_pool

    try:
        print(describe_plan(*plan_pool(pool_from_command_line(words))))
    except PoolError as error:
        print(f"refused: {error}")
        return False
    return True
