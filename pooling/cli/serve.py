# SPDX-License-Identifier: Apache-2.0
"""`tokenpool serve`: models, or a pool file, over HTTP. vLLM is imported once the command line is good."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile

from tokenpool import settings
from tokenpool.cli.command_line import has_api_key, pool_file_of, pool_from_command_line, take_cluster
from tokenpool.cli.key_words import with_environment
from tokenpool.cli.output import fail
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_flags import add_models, add_pool_flags
from tokenpool.cli.vllm_flags import HELP_OF_VLLM, answer_search
from tokenpool.errors import PoolError

USAGE = """tokenpool serve MODEL [MODEL ...] [any flag of vllm serve] [pool flags]
       tokenpool serve pool.yaml [pool flags]
       tokenpool serve pool.yaml --cluster [auto|local|ADDRESS]"""
_EPILOG = (
    "VLLM_API_KEY, TOKENPOOL_VIEW_KEY and TOKENPOOL_ADMIN_KEY take the place of flags for keys; on a command line "
    f"others see a key that is not in a file. {HELP_OF_VLLM}"
)

_PIXELS_OF_TENANTS = 1 << 26
"""Of an image, where there are tenants: four bytes each, and four times as many while they are made smaller."""


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool serve` to the tree."""
    description = "Serve models, or a pool file, over HTTP. Flags that are not the pool's go to vLLM's parser."
    parser = commands.add_parser(
        "serve", help=summary, usage=USAGE, description=description, epilog=_EPILOG, leaves_words=True
    )
    add_models(parser)
    add_pool_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it, and leave the process; raises PoolError for a command line that cannot be."""
    if answer_search(options.words, USAGE):
        return 0
    cluster, words = take_cluster(options.words)
    # What needs no vLLM is checked first: a typo in a pool file answers at once.
    pool = with_environment(pool_from_command_line(words), has_api_key(words))
    if cluster is not None:
        from tokenpool.cluster.session import prepare

        prepare(cluster)
    # vLLM and prometheus_client read these once, at import. A second engine's client erases the metrics of the first
    # unless they live in files, and an engine that dies must not end the server: the supervisor restarts the host.
    settings.METRICS_FOLDER.set(tempfile.mkdtemp(prefix="tokenpool-metrics-"))
    settings.LIVE_ON.set("1")
    # A redirect would lead past --allowed-media-domains, which vLLM compares with the first address only.
    settings.REDIRECTS.set_default("0")
    if pool.tenants:
        settings.MAX_IMAGE_PIXELS.set_default(str(_PIXELS_OF_TENANTS))
    from tokenpool.patches import apply_all
    from tokenpool.process.metric_files import outlast_full_disks
    from tokenpool.serve.start import serve

    apply_all()
    outlast_full_disks()
    try:
        status = serve(pool, cluster, pool_file_of(words))
    except PoolError as error:
        status = fail(error)
    except Exception:  # a fault of ours; the exit below does not wait for threads that hang
        logging.getLogger(__name__).exception("the server ends")
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # an orderly interpreter exit takes seconds and prints what Triton leaks
