# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine host process running on a node of a cluster, passes orders to it and reports what it has.

No Ray here: the actor around it says where reports go. Imports no vLLM either, so that the actor is small; only the
host process opens what the controller sends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tokenpool import settings
from tokenpool.cluster.machine import machine_id
from tokenpool.cluster.values import NOWHERE, HostedReport, HostReport, Order, StaleEpochError
from tokenpool.errors import HostError
from tokenpool.metric_registry import metric
from tokenpool.process.forked_child import ForkedChild
from tokenpool.process.guard import HostGuard
from tokenpool.process.template import Template
from tokenpool.wire.control import call_host, limit_of

logger = logging.getLogger(__name__)

_RESTART_WAITS_S = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)
_STABLE_AFTER_S = 60.0
_START_LIMIT_S = 300.0
_CLEAR_LIMIT_S = 2.0
_AGE = metric("host_pulse_age_seconds")
_ORDERS = ("add_packed", "remove_model", "attach_at", "detach_frontend")
"""Calls that wait for a host whatever it does; others are questions, which one whose pulse is overdue gets none of."""

Push = Callable[[HostReport], tuple[int, str] | None]
"""Sends a report to the controller; returns its epoch and identity, or None if it did not answer."""


class HostSupervisor:
    """One host process after the other; each is a new *life*. Usable from any thread."""

    def __init__(
        self,
        host: str,
        config: Mapping[str, Any],
        push: Push,
        *,
        period_s: float = 0.5,
        env: Mapping[str, str | None] | None = None,
        node: str = "",
        address: str = "",
        template: Template | None = None,
        labels: Collection[str] = (),
        generation: int = 0,
    ) -> None:
        """`config` holds the fields of a HostConfig; a variable that is None in `env` is kept from the host.

        `labels` are those by which models may ask for it.

        Hosts are forked from `template` if that can be.
        """
        self.host = host
        self.config = dict(config)
        self.epoch, self.controller = 0, ""
        self._push_to = push
        self._period_s = period_s
        self._env = dict(env or {})
        self._node, self._address, self._machine = node, address, machine_id()
        self._labels = frozenset((*labels, host, address))
        self._template = template
        self._lock = threading.RLock()  # guards what is below
        self._ordering = threading.Lock()  # one order at a time
        self._process: subprocess.Popen[bytes] | ForkedChild | None = None
        self._folder = ""
        self._key = b""
        self._life = ""
        self._changes = 0
        self._guard: HostGuard | None = None
        self._generation = generation
        self._numbers = itertools.count(time.monotonic_ns())  # a later supervisor of the node begins above
        self._models: dict[str, HostedReport] = {}
        self._loads: dict[str, dict[str, Any]] = {}
        self._free_pages: int | None = None
        self._building: tuple[str, int] | None = None
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._news = threading.Event()

    def start(self) -> None:
        """Begin; returns at once."""
        for target in (self._supervise, self._push, self._ask):
            thread = threading.Thread(target=target, name=f"{self.host}-{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # -- what the controller asks ------------------------------------------------------------------------

    def order(self, order: Order) -> int:
        """Carry out an order; returns how many have been in this life. Blocks while a model is loaded.

        Raises StaleEpochError for an order of a replaced controller, HostError for one to an earlier life, or that is
        not carried out in time, and what the host raises. An order for what is so already is done.
        """
        self._fence(order.epoch, order.controller)
        if not self._ordering.acquire(timeout=(limit_s := limit_of("add_packed"))):
            raise HostError(f"{self.host} has been at earlier orders for {limit_s:g} s")
        try:
            self._fence(order.epoch, order.controller)  # a newer one may have come while this one waited
            name, life = order.deployment.name, order.life
            with self._lock:
                if life != self._life:
                    raise HostError(f"{self.host} has a new process: {life} is gone")
                hosted = self._models.get(name)
            if order.action == "add" and (hosted is None or hosted.version != order.deployment.version):
                self._building = name, order.deployment.version
                self._news.set()
                self.call("add_packed", order.deployment.payload, *NOWHERE)  # servers have themselves attached later
                report = HostedReport(order.deployment.version)
                self._done(life, lambda: self._models.__setitem__(name, report))
            elif order.action == "remove" and hosted is not None:
                with contextlib.suppress(KeyError):  # an earlier order's answer did not come in time
                    self.call("remove_model", name)
                self._done(life, lambda: self._models.pop(name, None))
            return self._changes
        finally:
            self._building = None
            self._ordering.release()

    def _done(self, life: str, change: Callable[[], Any]) -> None:
        with self._lock:
            if life != self._life:
                raise HostError(f"{self.host}: the host process ended meanwhile")
            change()
            self._changes += 1
        self._news.set()

    def _fence(self, epoch: int, controller: str) -> None:
        with self._lock:
            stale = epoch < self.epoch or (epoch == self.epoch and controller != self.controller)
            if stale:
                raise StaleEpochError(f"{self.host} follows epoch {self.epoch}: order of epoch {epoch} refused")
            self.epoch, self.controller = epoch, controller

    def call(self, method: str, *args: Any) -> Any:
        """Call the host process; raises HostError when there is none, it ends meanwhile, or is late.

        `metrics` are answered without it, too: by the age of its pulse.
        """
        with self._lock:
            folder, key, life, guard = self._folder, self._key, self._life, self._guard
        if not life:
            raise HostError(f"{self.host}: the host process is not there")
        try:
            if guard is not None and guard.is_overdue and method not in _ORDERS:
                raise HostError(f"{self.host}: {guard.reason}")
            answer = call_host(os.path.join(folder, "control"), key, method, *args)
        except HostError:
            if method != "metrics":
                raise
            answer = ""
        return answer + _age_text(guard) if method == "metrics" else answer

    def report(self) -> HostReport:
        """What is known of the host now; asks nobody."""
        with self._lock:
            models = {
                name: HostedReport(hosted.version, self._loads.get(name, {})) for name, hosted in self._models.items()
            }
            return HostReport(
                host=self.host,
                life=self._life,
                epoch=self.epoch,
                controller=self.controller,
                changes=self._changes,
                number=next(self._numbers),
                generation=self._generation,
                pid=self._process.pid if self._process else 0,
                device_memory=self.config["device_memory"],
                host_memory=self.config.get("host_memory", 0),
                page_size=self.config["page_size"],
                kv_floor_pages=self.config.get("kv_floor_pages", 1),
                movable=self.config.get("movable_weights", False),
                models=models,
                free_pages=self._free_pages,
                labels=self._labels,
                overdue=self._guard.reason if self._guard is not None else "",
                building=self._building if self._life else None,
                node=self._node,
                address=self._address,
                machine=self._machine,
                actor_pid=os.getpid(),
            )

    def stop(self, limit_s: float) -> None:
        """Let the host finish, at most `limit_s`, then end it, and leave no file of it."""
        self._stopping.set()
        self._news.set()
        if self._template is not None:
            self._template.stop()
        with self._lock:
            process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads[:1]:  # the one that removes the host's folder
            thread.join(_CLEAR_LIMIT_S)

    # -- the process -------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        # The kernel kills the host process when this thread ends: it ends with the actor's process.
        attempt = 0
        while not self._stopping.is_set():
            self._stopping.wait(_RESTART_WAITS_S[min(attempt, len(_RESTART_WAITS_S) - 1)])
            started = time.monotonic()
            try:
                process = self._launch()
                status = process.wait()
            except Exception:  # whatever stops a start, the next attempt may work
                logger.exception("host does not start host=%s", self.host)
                status = None
            attempt = 1 if time.monotonic() - started > _STABLE_AFTER_S else attempt + 1
            with self._lock:
                self._process, self._life, self._models, self._loads, self._changes = None, "", {}, {}, 0
                self._guard = None
                folder, self._folder = self._folder, ""
            self._news.set()
            shutil.rmtree(folder, ignore_errors=True)
            if not self._stopping.is_set():
                logger.error("host process ended host=%s status=%s, restarting", self.host, status)

    def _launch(self) -> subprocess.Popen[bytes] | ForkedChild:
        folder = tempfile.mkdtemp(prefix="tokenpool-")  # mode 0700: only this user reaches the sockets
        metrics = os.path.join(folder, "metrics")
        os.mkdir(metrics)
        key = secrets.token_bytes(32)
        given = {**settings.environment_of_hosts(), **self._env}
        env = {name: value for name, value in given.items() if value is not None}
        own = {settings.CONTROL_KEY.name: key.hex(), settings.METRICS_FOLDER.name: metrics}
        control = os.path.join(folder, "control")
        process: subprocess.Popen[bytes] | ForkedChild | None = None
        if self._template is not None:
            process = self._template.fork(self._words(control), env, own)
        if process is None:
            command = self._command(control, key)
            process = subprocess.Popen(command, env=env | own, stdin=subprocess.DEVNULL, start_new_session=True)
        with self._lock:
            self._process, self._folder, self._key = process, folder, key
        deadline = time.monotonic() + _START_LIMIT_S
        while not os.path.exists(control):
            if process.poll() is not None:
                raise HostError(f"the host process ended with status {process.returncode} while starting")
            if time.monotonic() > deadline or self._stopping.is_set():
                process.kill()
                process.wait()
                raise HostError("the host process did not listen in time")
            time.sleep(0.02)
        guard = HostGuard.of(self.host, process.pid, control, key, self.config)
        with self._lock:
            self._life, self._guard = secrets.token_hex(4), guard
        logger.info("host is up host=%s life=%s pid=%d", self.host, self._life, process.pid)
        self._news.set()
        return process

    def _command(self, control: str, key: bytes) -> list[str]:
        """What starts a host process that listens at `control`; the key is in its environment."""
        return [sys.executable, "-m", "tokenpool.host", *self._words(control)]

    def _words(self, control: str) -> list[str]:
        return [control, json.dumps(self.config)]

    # -- reports -----------------------------------------------------------------------------------------

    def _push(self) -> None:
        while not self._stopping.is_set():
            self._news.clear()
            try:
                answer = self._push_to(self.report())
            except Exception as error:  # a controller that is being restarted: the next report reaches it
                logger.debug("report not delivered: %s", error)
                answer = None
            if answer is not None:
                with self._lock:
                    if answer[0] > self.epoch:
                        self.epoch, self.controller = answer
            self._news.wait(self._period_s)

    def _ask(self) -> None:
        """Ask the host process for its queues, which it tells when the build that it may be in is over."""
        while not self._stopping.wait(self._period_s):
            with self._lock:
                life = self._life
            if not life:
                continue
            try:
                loads, state = self.call("load"), self.call("state")
            except Exception as error:  # it ended; the supervisor sees that too
                logger.debug("host does not answer: %s", error)
                continue
            for name, load in loads.items():
                load.update(state["models"].get(name, {}))
            with self._lock:
                if life == self._life:
                    self._loads, self._free_pages = loads, state["num_free_pages"]


def _age_text(guard: HostGuard | None) -> str:
    """The age of the pulse as a part of a scrape."""
    if guard is None:
        return ""
    name = _AGE.exported
    return f"# HELP {name} {_AGE.text}\n# TYPE {name} {_AGE.kind}\n{name} {guard.age_s:.3f}\n"
