# SPDX-License-Identifier: Apache-2.0
"""One scrape of a cluster: the frontend's own metrics and those of its hosts, told apart by a label `host`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

HOST_LABEL = "host"


def merged(own: CollectorRegistry, hosts: Mapping[str, str]) -> bytes:
    """The text of a scrape: what `own` has, and the samples of each host's own text with its name as a label.

    A family that several have is written once, as Prometheus demands; its help is the first one's.
    """
    return generate_latest(_Merged(own, hosts))  # it needs no more than collect


class _Merged:
    def __init__(self, own: CollectorRegistry, hosts: Mapping[str, str]) -> None:
        self._own = own
        self._hosts = hosts

    def collect(self) -> Iterator[Metric]:
        families = {family.name: family for family in self._own.collect()}
        for host, text in sorted(self._hosts.items()):
            for family in text_string_to_metric_families(text):
                samples = [s._replace(labels={**s.labels, HOST_LABEL: host}) for s in family.samples]
                family.samples = []
                families.setdefault(family.name, family).samples += samples
        yield from families.values()
