# SPDX-License-Identifier: Apache-2.0
"""Which host stands for which of the kinds that are wanted. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tokenpool.host_kinds import Kind


def match(kinds: Sequence[Kind], hosts: Iterable[str], is_of: Callable[[str, Kind], bool]) -> dict[int, str]:
    """A host for as many of these kinds as can be had at once, by their place; no host stands for two.

    Kinds that come first get one if any of their places can: a later one takes no host from them.
    """
    order = list(hosts)
    taken: dict[str, int] = {}

    def place(index: int, tried: set[str]) -> bool:
        for host in (h for h in order if is_of(h, kinds[index])):
            if host in tried:
                continue
            tried.add(host)
            if host not in taken or place(taken[host], tried):
                taken[host] = index
                return True
        return False

    for index in range(len(kinds)):
        if len(taken) == len(order):
            break
        place(index, set())
    return {index: host for host, index in taken.items()}
