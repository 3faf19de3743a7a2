# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of several nodes on this machine, in a child process with settings of its own.

    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes:
        ...                      # nodes.address
        nodes.kill(0)            # SIGKILL of a node's raylet
        nodes.add()              # a new node, the last of nodes.raylets; nodes.add("gpu=h100") has that label
    with RayNodes(num_nodes=0, cpus_per_node=1, max_simulated=2) as nodes:
        nodes.count()            # 1, the head, and up to 2 more while actors ask for them

The child matters: Ray reads its authentication mode when it is imported, which vLLM may have done in a test process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
_AUTOSCALER_ENV = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0"}
_IDLE_MINUTES = 0.1
_END_S = 5.0
ENV = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """Nodes without a dashboard; the head has no CPUs, so hosts are on the others only."""

    def __init__(self, *, num_nodes: int, cpus_per_node: int, max_simulated: int = 0) -> None:
        """Ray's autoscaler adds up to `max_simulated` further nodes, and takes them away once they are idle."""
        self._arguments = [str(num_nodes), str(cpus_per_node), str(max_simulated)]
        self._is_scaled = max_simulated > 0
        self.address = ""
        self.raylets: list[int] = []
        """Process id of each node's raylet, the head's aside."""

    def __enter__(self) -> RayNodes:
        self._folder = tempfile.mkdtemp(prefix="tp-ray-", dir="/tmp")  # short: it holds Unix sockets
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.parts.ray_nodes", self._folder, *self._arguments],
            cwd=Path(__file__).parents[2], env={**os.environ, **ENV, **(_AUTOSCALER_ENV if self._is_scaled else {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            told = self._hear()
        except BaseException:
            self.__exit__()
            raise
        self.address, self.raylets = told["address"], told["raylets"]
        return self

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        if line is None:
            raise AssertionError("the Ray nodes do not start")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the child ends the nodes
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        if self._is_scaled:  # the autoscaler does not end its nodes with itself
            self._signal(signal.SIGTERM)
            self._until_gone()
        if self._is_scaled or self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _until_gone(self) -> None:
        deadline_s = time.monotonic() + _END_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline_s:
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)

    def kill(self, index: int) -> None:
        """End a node as if its machine had lost power, as far as Ray can tell."""
        os.kill(self.raylets[index], signal.SIGKILL)

    def add(self, label: str = "") -> None:
        """Start one more node, alike the others but for a label such as `gpu=h100`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"add {label}\n")
        self._process.stdin.flush()
        self.raylets.append(self._hear()["raylet"])

    def count(self) -> int:
        """Nodes that are alive, with the head."""
        assert self._process.stdin is not None
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        count: int = self._hear()["count"]
        return count


def _scaled(folder: str, cpus_per_node: int, most: int) -> dict[str, Any]:
    """Arguments of a head with an autoscaler, whose nodes are raylets of this machine."""
    from ray._private.services import get_node_ip_address

    with socket.socket() as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    provider = {
        "type": "external",  # by its name it needs a file that Ray's wheel does not have
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": f"{get_node_ip_address()}:{port}",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    node = {"CPU": cpus_per_node, "object_store_memory": 80 << 20}
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "simulated": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    lists += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config = {
        "cluster_name": "simulated", "max_workers": most, "upscaling_speed": 1.0, "provider": provider, "auth": {},
        "idle_timeout_minutes": _IDLE_MINUTES, "available_node_types": types, "head_node_type": "ray.head.default",
        "file_mounts": {}, "file_mounts_sync_continuously": False, **{key: [] for key in lists},
    }  # fmt: skip
    path = Path(folder, "autoscaler.yaml")
    path.write_text(json.dumps(config))
    return {"autoscaling_config": str(path), "gcs_server_port": port}


def _main(folder: str, num_nodes: int, cpus_per_node: int, max_simulated: int) -> None:
    from ray.cluster_utils import Cluster

    # Ray writes the address of its cluster there, and makes the folder only where it is the session's own.
    os.makedirs(os.path.join(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray"), exist_ok=True)
    common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 << 20}
    head = {**common, "num_cpus": 0, "_system_config": _SYSTEM_CONFIG, "temp_dir": folder}
    head |= _scaled(folder, cpus_per_node, max_simulated) if max_simulated else {}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=cpus_per_node, **common) for _ in range(num_nodes)]

    def raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    print(json.dumps({"address": cluster.address, "raylets": [raylet(node) for node in nodes]}), flush=True)
    for line in sys.stdin:
        if line == "count\n":
            told = {"count": sum(node["Alive"] for node in cluster.global_state.node_table())}
        else:
            key, _, value = line.removeprefix("add ").strip().partition("=")
            labels = {"labels": {key: value}} if key else {}
            told = {"raylet": raylet(cluster.add_node(num_cpus=cpus_per_node, **common, **labels))}
        print(json.dumps(told), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
