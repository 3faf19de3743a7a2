# SPDX-License-Identifier: Apache-2.0
"""`tokenpool down`: end a pool of a Ray cluster, whoever started it. Imports no vLLM.

tokenpool down pool.yaml                       # the pool of that name in the cluster that this machine belongs to
tokenpool down --name batch --cluster 10.0.0.1:6379
"""

from __future__ import annotations

import argparse

from tokenpool.cli.parser import Parser
from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import load_pool_file
from tokenpool.errors import ConfigError
from tokenpool.logs import log_to_stderr
from tokenpool.units import parse_seconds

_EPILOG = (
    "Its servers take no more requests, finish what they have, at most as long as --wait and their shutdown_timeout "
    "say, and end; then hosts and controller end. Where no such pool is, nothing happens, and the status is 0."
)


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool down` to the tree."""
    parser = commands.add_parser("down", help=summary, description="End a pool of a Ray cluster.", epilog=_EPILOG)
    parser.add_argument("file", metavar="FILE", nargs="?", help="the pool file (.yaml), for its cluster.name")
    parser.add_argument("--name", metavar="NAME", help="the pool's cluster.name, without a file (default tokenpool)")
    parser.add_argument("--cluster", metavar="ADDRESS", default="auto", help="of Ray: auto or HOST:PORT (default auto)")
    parser.add_argument("--wait", metavar="TIME", default="60s", help="what running requests may take (default 60s)")


def run(options: argparse.Namespace) -> int:
    """End the pool; raises PoolError if Ray, or the pool, does not answer."""
    limit_s = parse_seconds(options.wait, "--wait")
    if options.cluster == "local":
        raise ConfigError("a pool of `serve --cluster local` ends with its server", key="--cluster")
    if options.file and options.name:
        raise ConfigError("name the pool by its file, or by --name", key="--name")
    config = load_pool_file(options.file).cluster if options.file else ClusterConfig(name=options.name or "tokenpool")
    log_to_stderr()
    from tokenpool.cluster.session import Session, connect, prepare

    prepare(options.cluster)
    connect(options.cluster, config, 1)
    was_there = Session(config, owns_ray=False).end(limit_s)
    print(f"pool {config.name} has ended" if was_there else f"there is no pool {config.name}")
    return 0
