# SPDX-License-Identifier: Apache-2.0
"""The devices of a host's ranks as one, with all their pages from the start: a shortage of any is told then."""

from __future__ import annotations

from tokenpool.host.load.device_choice import make_all_pages, make_device, run_near_gpu
from tokenpool.host.ranks.rank_group import RankGroup
from tokenpool.host.ranks.rank_watch import RankLimits
from tokenpool.memory.devices.device import Device
from tokenpool.memory.devices.mirrored import MirroredDevice
from tokenpool.settings import OFF_IN_GROUPS
from tokenpool.wire.spec import HostConfig


def open_devices(config: HostConfig, device: Device | None, num_pages: int) -> tuple[Device, RankGroup | None]:
    """The device of a host, or `device`, and the group of its ranks, None if there is one only.

    In a group no later call for a page can fail on another rank where it works on this one. Raises CapacityError when
    a device has not so many pages, ConfigError where there is none.
    """
    device = make_all_pages(device or make_device(config.page_size, config.cpu_link), num_pages)
    if config.tensor_parallel_size == 1:
        return device, None
    for variable in OFF_IN_GROUPS:  # before the other ranks start, which inherit it, and before vLLM makes its groups
        variable.set("0")
    group = RankGroup(config.tensor_parallel_size, config.page_size, config.cpu_link, RankLimits.of(config))
    try:
        with group.watch.work("the start of the ranks", builds=True) as work:
            work.question = group.ask("make_pages", num_pages)
            group.answers(work.question)
    except BaseException:
        group.close()
        raise
    run_near_gpu(device)  # not before: the others would inherit it
    return MirroredDevice(device, group.repeat), group
