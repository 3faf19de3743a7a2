# SPDX-License-Identifier: Apache-2.0
"""Schemathesis against the OpenAPI description of a running pool with tenants: which answers are server errors?

Every request whose answer is a 5xx goes once more to plain `vllm serve` with the same model: `ours` are the 5xx that
plain vLLM does not give. 503 with Retry-After is an answer, not an error. Needs the `schemathesis` command, which is no
dependency of tokenpool: install it into an environment of its own and give its path.
"""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.parts import common, sized_models
from bench.tenant_fairness import wait_until_ready
from tokenpool.tenant_config import hash_key

MODEL, KEY = "fuzzed", "fuzz-key"
FLAGS = [*common.MODEL_FLAGS, "--served-model-name", MODEL]


@dataclass(frozen=True, slots=True)
class SchemathesisRun:
    """Results; see the module."""

    cases: int
    failures: int
    """Answers that are server errors of ours."""
    operations: int
    statuses: dict[str, int]
    vllm_failures: int
    """Server errors that plain vLLM gives to the same request."""
    better: dict[str, str]
    ours: list[dict[str, Any]]
    vllm: dict[str, int]
    """Those of plain vLLM by operation."""
    versions: str


def run(
    *,
    schemathesis: Path,
    phases: str,
    max_examples: int,
    max_time_s: int,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> SchemathesisRun:
    """Start both servers, let Schemathesis talk to the pool, and compare."""
    with common.scratch(logs) as (folder, log_folder, stack):
        path = sized_models.make_all(folder, {MODEL: 4})[MODEL]
        pool_file = folder / "pool.yaml"
        pool_file.write_text(json.dumps(_pool(path)))
        pool = common.Server([*common.POOL, str(pool_file)], [MODEL], log_folder / "pool.log")
        stack.callback(pool.close)
        wait_until_ready([pool], start_limit_s)
        har, description = folder / "run.har", folder / "openapi.json"
        url = f"http://127.0.0.1:{pool.port}"
        description.write_text(json.dumps(pool.get("/openapi.json", key=KEY, limit_s=120)))
        command = [
            schemathesis, "run", str(description), "--url", url, "-H", f"Authorization: Bearer {KEY}",
            "--checks", "not_a_server_error", "--max-examples", str(max_examples), "--max-time", str(max_time_s),
            "--seed", str(seed), "--phases", phases, "--no-shrink", "--continue-on-failure",
            "--generation-database", "none", "--request-timeout", "60", "--report", "har", "--report-har-path",
            str(har), "--warnings", "off", "--no-color", "--output-sanitize", "false",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        (log_folder / "schemathesis.log").write_text(done.stdout + done.stderr)
        if not har.exists():
            raise RuntimeError(f"schemathesis wrote no report: {(done.stdout + done.stderr)[-2000:]}")
        entries = json.loads(har.read_text())["log"]["entries"]
        errors = [entry for entry in entries if entry["response"]["status"] >= 500 and not _is_refusal(entry)]
        pool.close()
        plain_errors: Counter[str] = Counter()
        ours = []
        if errors:
            words = [*common.PLAIN, "--model", str(path), *FLAGS, "--kv-cache-memory-bytes", str(64 << 20)]
            plain = common.Server(words, [MODEL], log_folder / "plain.log")
            stack.callback(plain.close)
            common.wait_until_ready([plain], start_limit_s)
            for entry in errors:
                if _replay(plain.port, entry) >= 500:
                    plain_errors[_operation(entry)] += 1
                else:
                    ours.append(_describe(entry))
    return SchemathesisRun(
        cases=len(entries),
        failures=len(ours),
        operations=len({_operation(entry) for entry in entries}),
        statuses=dict(sorted(Counter(str(entry["response"]["status"]) for entry in entries).items())),
        vllm_failures=sum(plain_errors.values()),
        better={"failures": "lower", "cases": "higher"},
        ours=ours,
        vllm=dict(plain_errors),
        versions=subprocess.run([schemathesis, "--version"], capture_output=True, text=True).stdout.strip(),
    )


def _pool(path: Path) -> dict[str, Any]:
    return {
        "models": [{"name": MODEL, "model": str(path), "args": list(common.MODEL_FLAGS)}],
        "device_memory": "128MiB",
        "page_size": "1MiB",
        "tenants": [{"name": "fuzzer", "keys": hash_key(KEY), "requests_per_minute": 10**9}],
    }


def _is_refusal(entry: dict[str, Any]) -> bool:
    names = {header["name"].lower() for header in entry["response"]["headers"]}
    return entry["response"]["status"] == 503 and "retry-after" in names


def _operation(entry: dict[str, Any]) -> str:
    path = "/" + entry["request"]["url"].split("/", 3)[-1].partition("?")[0]
    return f"{entry['request']['method']} {path}"


def _replay(port: int, entry: dict[str, Any]) -> int:
    """Send a request to plain vLLM; returns the status, 599 for a connection without an answer."""
    asked = entry["request"]
    url = f"http://127.0.0.1:{port}/" + asked["url"].split("/", 3)[-1]
    body = asked.get("postData", {}).get("text")
    skipped = ("host", "content-length", "authorization", "connection", "accept-encoding")
    headers = {h["name"]: h["value"] for h in asked["headers"] if h["name"].lower() not in skipped}
    data = None if body is None else body.encode(errors="surrogatepass")
    request = urllib.request.Request(url, data, headers, method=asked["method"])
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 599


def _describe(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "operation": _operation(entry),
        "status": entry["response"]["status"],
        "request": entry["request"].get("postData", {}).get("text", "")[:500],
        "response": entry["response"]["content"].get("text", "")[:500],
    }


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--schemathesis", type=Path, default=Path("schemathesis"), help="path of the command (default: %(default)s)")
    add("--phases", default="coverage,fuzzing", help="of Schemathesis (default: %(default)s)")
    add("--max-examples", type=int, default=20, help="per operation and phase (default: %(default)s)")
    add("--max-time-s", type=int, default=300, help="of the whole run (default: %(default)s)")
    common.report("schemathesis", run, parser.parse_args(), ["cases", "failures", "vllm_failures"])


if __name__ == "__main__":
    main()
