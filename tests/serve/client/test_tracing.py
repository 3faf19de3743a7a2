# SPDX-License-Identifier: Apache-2.0
"""Traces of a real server whose models do not fit together, received by a collector in the test."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll
from tests.helpers.told_engine import make_request
from tokenpool.serve.client.tracing import RequestTracer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KINDS = ("llama", "qwen2")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Span:
    name: str
    trace_id: str
    span_id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    service: str
    failed: bool
    children: list[Span] = field(default_factory=list)


class Collector:
    """Takes spans as OTLP over HTTP, as a real collector does."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, message: Any) -> None:
        for resource in message.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_read(span, service) for span in scope.spans]

    def requests(self, trace_id: str, count: int) -> list[Span]:
        """The request spans of a trace once there are `count`, each with its children by start."""

        def whole() -> list[Span]:
            return [s for s in self.spans if s.trace_id == trace_id and s.name == "llm_request"]

        found = poll(whole, until=lambda spans: len(spans) >= count)
        for span in found:
            span.children = sorted((s for s in self.spans if s.parent == span.span_id), key=lambda s: s.start)
        return found


def _read(span: Any, service: str) -> Span:
    attributes = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    times = span.start_time_unix_nano, span.end_time_unix_nano
    return Span(span.name, *ids, *times, attributes, service, failed=span.status.code == 2)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels, collector: Collector) -> Iterator[PoolServerProcess]:
    args = {"otlp_traces_endpoint": collector.url, "max_model_len": 128}
    pool = {
        "models": [{"name": kind, "model": str(tiny_models.path(kind)), "args": args} for kind in KINDS],
        "device_memory": 10 * (256 << 10),
        "page_size": 256 << 10,
        "host_memory": "256MiB",
        "weights": "movable",
        "admin_key": "test-admin-key-0123",
    }
    env = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with PoolServerProcess(pool, env=env) as server:
        yield server


def complete(server: PoolServerProcess, model: str, trace_id: str, tokens: int = 8, **options: Any) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True}
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"}
    return server.request("POST", "/v1/completions", json=body, headers=headers, **options)


def test_a_request_is_one_span_in_the_trace_of_its_client(server, collector):
    """Phases lie inside of it, one after the other, and its attributes have vLLM's names."""
    assert complete(server, "llama", TRACE).status_code == 200

    [span] = collector.requests(TRACE, 1)
    assert (span.parent, span.service, span.failed) == (PARENT, "tokenpool", False)
    told = {name: span.attributes[f"gen_ai.{name}"] for name in ("request.model", "request.max_tokens")}
    told |= {name: span.attributes[f"gen_ai.usage.{name}"] for name in ("prompt_tokens", "completion_tokens")}
    assert told == {"request.model": "llama", "request.max_tokens": 8, "prompt_tokens": 3, "completion_tokens": 8}
    phases = [child for child in span.children if child.name in ("queue", "prefill", "decode")]
    assert [child.name for child in phases] == ["queue", "prefill", "decode"]
    times = [span.start, *(t for child in phases for t in (child.start, child.end)), span.end]
    assert times == sorted(times)


def test_a_trace_tells_switches_and_turns_of_others(server, collector):
    """Two models that do not fit together take turns: each request waited for the other's turn or for a switch."""
    trace_id = TRACE[::-1]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda kind: complete(server, kind, trace_id, 40), KINDS * 2))
    assert [answer.status_code for answer in answers] == [200] * 4

    spans = collector.requests(trace_id, 4)
    waits = [child for span in spans for child in span.children if child.name in ("switch", "turn")]
    assert {child.name for child in waits} == {"switch", "turn"}
    for span in spans:
        own = span.attributes["gen_ai.request.model"]
        for child in span.children:
            assert span.start <= child.start <= child.end <= span.end
            if child.name in ("switch", "turn"):
                assert (child.attributes["tokenpool.model"] == own) == (child.name == "switch")


def test_an_aborted_request_has_a_failed_span(server, collector):
    trace_id = "f" * 32
    with server.host_held_still(), pytest.raises(httpx.ReadTimeout):
        body = {"model": "llama", "prompt": [5, 6, 7], "max_tokens": 8}
        headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"}
        httpx.post(f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=3)

    [span] = collector.requests(trace_id, 1)
    assert span.failed
    assert span.attributes["gen_ai.response.finish_reasons"].values[0].string_value == "abort"


def test_the_client_decides_what_is_sampled(server, collector):
    """A request of a trace that its client does not record leaves none."""
    headers = {"traceparent": f"00-{'e' * 32}-{PARENT}-00"}
    body = {"model": "llama", "prompt": [1, 2], "max_tokens": 2}
    assert server.request("POST", "/v1/completions", json=body, headers=headers).status_code == 200
    assert complete(server, "llama", "d" * 32).status_code == 200
    collector.requests("d" * 32, 1)
    assert [span for span in collector.spans if span.trace_id == "e" * 32] == []


def test_the_last_spans_are_sent_at_the_end(collector, monkeypatch):
    """Spans that wait for the next batch when the process ends are with the collector before it does."""
    from tokenpool.serve.client.tracing import end_tracing, provider_for

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    span = provider_for(collector.url).get_tracer("test").start_span("last")
    span.end()
    end_tracing(30.0)
    assert [s.name for s in collector.spans if s.name == "last"] == ["last"]


def test_a_move_to_another_host_is_an_event_of_the_span():
    """The first host that a request is sent to is no move, nor is the same one again."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = RequestTracer(provider.get_tracer("test"), "m")
    tracer.begin(make_request("r"))

    for host in ("h0", "h0", "h1", "h0"):
        tracer.sent("r", host)
    tracer.close()

    [span] = exporter.get_finished_spans()
    moves = [(event.name, dict(event.attributes or {})) for event in span.events]
    assert moves == [("moved", {"from": "h0", "to": "h1"}), ("moved", {"from": "h1", "to": "h0"})]
