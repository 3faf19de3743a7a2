# SPDX-License-Identifier: Apache-2.0
"""Several frontends of one host: each tells every engine where it listens, and is forgotten when it is gone."""

from __future__ import annotations

import logging

from tokenpool.errors import EngineLostError, HostError
from tokenpool.host.engine_host import EngineHost
from tokenpool.wire.addresses import EngineAddresses

logger = logging.getLogger(__name__)


def attach_frontend(host: EngineHost, model: str, client_index: int, addresses: EngineAddresses) -> None:
    """Let a model's engine serve one more frontend; raises HostError for a model that is not there.

    A frontend that comes with the index of an earlier one takes its place: the requests of that one are dropped.
    """
    if model not in host.models:
        raise HostError(f"model {model!r} is not on this host")
    host.models[model].core.attach(client_index, addresses)


def detach_frontend(host: EngineHost, client_index: int) -> None:
    """A frontend is gone: drop its requests at all engines; raises HostError that names those that failed to."""
    failed = {}
    for name, hosted in host.models.items():
        try:
            hosted.core.detach(client_index)
        except EngineLostError:
            raise
        except Exception as error:  # the other engines are no less to forget it
            logger.exception("frontend not detached model=%s index=%d", name, client_index)
            failed[name] = error
    if failed:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
        raise HostError(f"{len(failed)} of {len(host.models)} models did not drop frontend {client_index}: {reasons}")
