# SPDX-License-Identifier: Apache-2.0
"""What becomes of the flags of `vllm serve` that do not go to a model's engine or app as they do in vLLM.

All others do. docs/flags.md tells the same to people. Imports no vLLM.
"""

from __future__ import annotations

TAKEN_OVER = {
    "--host": "`host` of the pool",
    "--port": "`port` of the pool",
    "--api-key": "`api_key` of the pool, which guards the whole port",
    "--shutdown-timeout": "`shutdown_timeout` of the pool",
    "--config": "the flags in the file stand in its place; those given beside it win",
    "--gpu-memory-utilization": "`device_memory` of the pool is what its models share; a line of the log says so",
    "--kv-cache-memory-bytes": "counts for `device_memory: auto` only; KV grows and shrinks as models need it",
}
"""Flags whose work a setting of the pool does, by what does it."""

POOL_SETTINGS = {
    "--api-key": "api_key",
    "--host": "host",
    "--port": "port",
    "--shutdown-timeout": "shutdown_timeout",
}
"""Those that are refused among a model's flags, by their key of the pool file."""

PORT = {
    "--ssl-keyfile": "ssl_keyfile",
    "--ssl-certfile": "ssl_certfile",
    "--ssl-ca-certs": "ssl_ca_certs",
    "--ssl-cert-reqs": "ssl_cert_reqs",
    "--ssl-ciphers": "ssl_ciphers",
    "--enable-ssl-refresh": "enable_ssl_refresh",
    "--uvicorn-log-level": "uvicorn_log_level",
    "--disable-uvicorn-access-log": "disable_uvicorn_access_log",
    "--disable-access-log-for-endpoints": "disable_access_log_for_endpoints",
    "--allow-credentials": "allow_credentials",
    "--allowed-origins": "allowed_origins",
    "--allowed-methods": "allowed_methods",
    "--allowed-headers": "allowed_headers",
    "--middleware": "middleware",
    "--enable-request-id-headers": "enable_request_id_headers",
    "--root-path": "root_path",
    "--h11-max-incomplete-event-size": "h11_max_incomplete_event_size",
    "--h11-max-header-count": "h11_max_header_count",
    "--logging-config": "logging_config",
    "--log-level": "logging_config",
    "--log-config-file": "logging_config",
    "--distributed-timeout-seconds": "distributed_timeout_seconds",
    "--cpu-distributed-timeout-seconds": "cpu_distributed_timeout_seconds",
    "--disable-custom-all-reduce": "disable_custom_all_reduce",
}
"""Flags of the port or of whole processes, by where vLLM's parser puts them: the first model's hold for all."""

_DATA_PARALLEL = "data parallelism: serve more hosts of a cluster instead"
_RANKS = "the pool starts engines and their ranks itself: spread hosts over machines with --cluster"
_OFFLOAD = "offloading of weights, which vLLM has once per process: the pool moves weights by itself"
_SLEEP = "sleep mode, which the pool replaces: weights leave and come back by themselves"
_IMAGES = "images come to the engine host over its sockets, not through shared memory"
_NUMA = "the pool places its engine host itself: bind the server with numactl"

REFUSED = {
    "--headless": "no server of its own",
    "--grpc": "the pool speaks HTTP",
    "--grpc-port": "the pool speaks HTTP",
    "--uds": "the pool listens on TCP",
    "--api-server-count": "`frontends` of the pool does it",
    "--num-gpu-blocks-override": "KV grows and shrinks",
    "--worker-cls": "the pool has a worker of its own; --worker-extension-cls is there",
    "--distributed-executor-backend": _RANKS,
    "--nnodes": _RANKS,
    "--node-rank": _RANKS,
    "--master-addr": _RANKS,
    "--master-port": _RANKS,
    "--ray-workers-use-nsight": _RANKS,
    "--enable-shm-tensor-arena": _RANKS,
    "--device-ids": "the pool has the first device that it sees: set CUDA_VISIBLE_DEVICES",
    "--numa-bind": _NUMA,
    "--numa-bind-nodes": _NUMA,
    "--numa-bind-cpus": _NUMA,
    "--pipeline-parallel-size": "pipeline parallelism",
    "--decode-context-parallel-size": "context parallelism",
    "--prefill-context-parallel-size": "context parallelism",
    "--data-parallel-size": _DATA_PARALLEL,
    "--data-parallel-rank": _DATA_PARALLEL,
    "--data-parallel-start-rank": _DATA_PARALLEL,
    "--data-parallel-size-local": _DATA_PARALLEL,
    "--data-parallel-address": _DATA_PARALLEL,
    "--data-parallel-rpc-port": _DATA_PARALLEL,
    "--data-parallel-backend": _DATA_PARALLEL,
    "--data-parallel-hybrid-lb": _DATA_PARALLEL,
    "--data-parallel-external-lb": _DATA_PARALLEL,
    "--data-parallel-multi-port-external-lb": _DATA_PARALLEL,
    "--data-parallel-supervisor-port": _DATA_PARALLEL,
    "--dp-supervisor-probe-interval-s": _DATA_PARALLEL,
    "--dp-supervisor-probe-timeout-s": _DATA_PARALLEL,
    "--dp-supervisor-probe-failure-threshold": _DATA_PARALLEL,
    "--enable-elastic-ep": _DATA_PARALLEL,
    "--elastic-ep-max-dp-size": _DATA_PARALLEL,
    "--enable-fault-tolerance": "the pool starts a dead engine host again by itself",
    "--fault-tolerance-config": "the pool starts a dead engine host again by itself",
    "--enable-eplb": "experts that are rearranged at run time",
    "--eplb-config": "experts that are rearranged at run time",
    "--enable-sleep-mode": _SLEEP,
    "--sleep-mode-offload-cudagraph": _SLEEP,
    "--sleep-preserve-parameter-names": _SLEEP,
    "--enable-nccl-comm-suspend": _SLEEP,
    "--enable-cumem-allocator": "the pool has an allocator of its own",
    "--cpu-offload-gb": _OFFLOAD,
    "--cpu-offload-params": _OFFLOAD,
    "--offload-backend": _OFFLOAD,
    "--offload-group-size": _OFFLOAD,
    "--offload-num-in-group": _OFFLOAD,
    "--offload-params": _OFFLOAD,
    "--offload-prefetch-step": _OFFLOAD,
    "--kv-offloading-size": "KV offloading: `host_memory` of the pool holds KV that is off the device",
    "--kv-offloading-backend": "KV offloading: `host_memory` of the pool holds KV that is off the device",
    "--kv-transfer-config": "a KV connector: hosts of a cluster hand KV over by themselves",
    "--ec-transfer-config": "an EC connector",
    "--weight-transfer-config": "weight transfer: an eviction would lose what was sent",
    "--mm-tensor-ipc": _IMAGES,
    "--mm-processor-cache-type": _IMAGES,
    "--mm-shm-cache-max-object-size-mb": _IMAGES,
}
"""Flags that cannot have their effect, by the reason; each is refused unless its value is vLLM's default."""
