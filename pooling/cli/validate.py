# SPDX-License-Identifier: Apache-2.0
"""`tokenpool validate`: what `tokenpool serve` checks at its start, and the plan that it makes."""

from __future__ import annotations

import argparse

from tokenpool.cli.command_line import pool_from_command_line
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_flags import add_models, add_pool_flags
from tokenpool.cli.serve import USAGE as USAGE_OF_SERVE
from tokenpool.cli.vllm_flags import HELP_OF_VLLM, answer_search

_USAGE = """tokenpool validate pool.yaml [pool flags]
       tokenpool validate MODEL [MODEL ...] [any flag of vllm serve] [pool flags]"""
_DESCRIPTION = "Check a pool as `tokenpool serve` does at its start and print the plan: memory, weights, models, SLOs."
_EPILOG = f"It loads no weights and starts nothing. {HELP_OF_VLLM}"


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool validate` to the tree."""
    parser = commands.add_parser(
        "validate", help=summary, usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG, leaves_words=True
    )
    add_models(parser)
    add_pool_flags(parser, without=("--cluster",))


def run(options: argparse.Namespace) -> int:
    """Print the plan; raises PoolError for a pool that would not start."""
    if answer_search(options.words, USAGE_OF_SERVE):
        return 0
    pool = pool_from_command_line(options.words)
    from tokenpool.patches import apply_all
    from tokenpool.serve.launch.launch_plan import describe_plan, plan_pool
    from tokenpool.serve.pool.http_loop import check_http

    apply_all()
    config, plans = plan_pool(pool, thorough=True)
    check_http(plans[0].args, config)
    print(describe_plan(config, plans))
    return 0
