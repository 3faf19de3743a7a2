# SPDX-License-Identifier: Apache-2.0
"""The `tokenpool` command and its subcommands. Errors of the user are one line and exit status 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module

USAGE = """usage: tokenpool serve MODEL [MODEL ...] [any flag of vllm serve] [pool flags]
       tokenpool serve pool.yaml [pool flags]
       tokenpool serve pool.yaml --cluster [auto|local|ADDRESS]
       tokenpool job [--address URL] [--submit] pool.yaml [pool flags]
       tokenpool validate pool.yaml
       tokenpool doctor [pool.yaml]
       tokenpool top [--url URL] [--view-key @FILE] [--interval SECONDS] [--once | --json]
       tokenpool trace [--url URL] [--view-key @FILE] [--seconds N] --json FILE | --png FILE
       tokenpool sim --requests FILE --gpus N --gpu NAME --policy NAME [more flags: --help]
       tokenpool plan --trace FILE --gpu NAME [--models FILE] [more flags: --help]
       tokenpool bench serve --models A,B --rate R | --trace FILE [more flags: --help]
       tokenpool key new | tokenpool key hash

pool flags: --device-memory SIZE --host-memory SIZE --page-size SIZE --weights auto|movable|fixed
            --kv-floor-pages N --turn-policy NAME --max-request SIZE --frontends N
            --view-key @FILE --admin-key @FILE --admin-models none|listed|any
            and of vllm serve: --host --port --api-key --shutdown-timeout
keys: VLLM_API_KEY, TOKENPOOL_VIEW_KEY and TOKENPOOL_ADMIN_KEY take the place of flags; on a command line others see
      a key that is not in a file
--help=all prints all flags, --help=WORD those of a group, such as Pool or ModelConfig, or with that in their name"""


VALIDATE_USAGE = """usage: tokenpool validate pool.yaml [pool flags]
       tokenpool validate MODEL [MODEL ...] [any flag of vllm serve] [pool flags]

Checks a pool as `tokenpool serve` does at its start and prints what it plans: memory, weights, models, due times. Loads
no weights and starts nothing. The pool flags are those of `tokenpool serve`; see tokenpool --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    command, *rest = words
    if command in ("-V", "--version", "version"):
        from tokenpool import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; known: {', '.join(COMMANDS)}")
    if ("-h" in rest or "--help" in rest) and (usage := _usage(command)):
        print(usage)
        return 0
    if command in ("serve", "validate") and (search := [word for word in rest if word.startswith("--help=")]):
        return _search_help(search[0].partition("=")[2])
    from tokenpool.errors import PoolError

    try:
        status = COMMANDS[command](rest)
        sys.stdout.flush()
        return status
    except PoolError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit tries to write the rest
        return 128 + signal.SIGPIPE


def _usage(command: str) -> str | None:
    """The help of a command; None for one whose own parser prints it."""
    if command == "serve":
        return USAGE
    if command == "validate":
        return VALIDATE_USAGE
    module = {"doctor": "doctor", "top": "top", "trace": "trace_tool", "job": "job_tool", "key": "key_tool"}
    return import_module(f"tokenpool.serve.{module[command]}").USAGE if command in module else None


def _search_help(search: str) -> int:
    """Print what `vllm serve --help=...` prints, with the pool's flags."""
    from tokenpool.serve.command_line import POOL_FLAG_HELP
    from tokenpool.serve.flags import serve_help

    if search.lower() == "all":
        print(f"{USAGE}\n")
    print(serve_help(search, POOL_FLAG_HELP))
    return 0


def _fail(message: str) -> int:
    print(f"tokenpool: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _serve(words: list[str]) -> int:
    from tokenpool.serve.command_line import has_api_key, pool_file_of, pool_from_command_line, take_cluster
    from tokenpool.serve.key_words import with_environment

    cluster, words = take_cluster(words)
    # What needs no vLLM is checked first: a typo in a pool file answers at once.
    pool = with_environment(pool_from_command_line(words), has_api_key(words))
    if cluster is not None:
        from tokenpool.cluster.session import prepare

        prepare(cluster)
    # vLLM and prometheus_client read these once, at import. A second engine's client erases the metrics of the first
    # unless they live in files, and an engine that dies must not end the server: the supervisor restarts the host.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="tokenpool-metrics-")
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"
    # A redirect would lead past --allowed-media-domains, which vLLM compares with the first address only.
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    from tokenpool.errors import PoolError
    from tokenpool.patches import apply_all
    from tokenpool.serve.run import serve

    apply_all()
    try:
        status = serve(pool, cluster, pool_file_of(words))
    except PoolError as error:
        status = _fail(str(error))
    except Exception:  # a fault of ours; the exit below does not wait for threads that hang
        logging.getLogger(__name__).exception("the server ends")
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # an orderly interpreter exit takes seconds and prints what Triton leaks


def _validate(words: list[str]) -> int:
    from tokenpool.serve.command_line import pool_from_command_line

    pool = pool_from_command_line(words)
    from tokenpool.patches import apply_all
    from tokenpool.serve.launch_plan import plan_pool
    from tokenpool.serve.run import check_http, describe_plan

    apply_all()
    config, plans = plan_pool(pool)
    check_http(plans[0].args, config)
    print(describe_plan(config, plans))
    return 0


def _job(words: list[str]) -> int:
    from tokenpool.serve.job_tool import job

    return job(words)


def _doctor(words: list[str]) -> int:
    from tokenpool.serve.doctor import doctor

    return doctor(words)


def _top(words: list[str]) -> int:
    from tokenpool.serve.top import top

    return top(words)


def _trace(words: list[str]) -> int:
    from tokenpool.serve.trace_tool import trace

    return trace(words)


def _sim(words: list[str]) -> int:
    from tokenpool.serve.sim_tool import simulate

    return simulate(words)


def _plan(words: list[str]) -> int:
    from tokenpool.serve.sim_tool import plan_gpus

    return plan_gpus(words)


def _bench(words: list[str]) -> int:
    from tokenpool.serve.bench_serve import bench

    return bench(words)


def _key(words: list[str]) -> int:
    from tokenpool.serve.key_tool import key

    return key(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "validate": _validate,
    "doctor": _doctor,
    "top": _top,
    "trace": _trace,
    "sim": _sim,
    "plan": _plan,
    "bench": _bench,
    "job": _job,
    "key": _key,
}
"""The subcommands by name; each takes the words after it and returns the exit status."""


if __name__ == "__main__":
    sys.exit(main())
