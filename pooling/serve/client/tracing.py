# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry traces: one span per request of a model that has `--otlp-traces-endpoint`, with its waits inside.

The span has vLLM's name and attributes and the client's `traceparent` as its parent. vLLM makes it when a request has
ended; here it begins with the request, so that those that are aborted have one too. In it are

    held      in front of the engine, for its tenant's turn
    queue     in the engine, until it is first scheduled
    prefill   until its first token
    decode    until its last token
    switch    the device waited for the model's weights or KV, in any of these
    turn      another model had the device
    moved     an event: a host goes on with the request of another one

Without OpenTelemetry's packages vLLM refuses the flag.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm.tracing import SpanAttributes, SpanKind, extract_trace_context
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.wire.trace import SINCE, WAITS

SPAN_NAME = "llm_request"
_providers: list[Any] = []


@cache
def provider_for(endpoint: str) -> Any:
    """The process' TracerProvider that sends to `endpoint`, in the protocol that vLLM would use."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from vllm.tracing.otel import get_span_exporter

    provider = TracerProvider(resource=Resource.create({"service.name": "tokenpool"}))  # OTEL_SERVICE_NAME goes first
    provider.add_span_processor(BatchSpanProcessor(get_span_exporter(endpoint)))
    _providers.append(provider)
    return provider


def end_tracing(limit_s: float) -> None:
    """Send the spans that have ended and are still here, for at most `limit_s`; for the end of the process."""
    ends = [threading.Thread(target=provider.shutdown, daemon=True) for provider in _providers]
    for end in ends:
        end.start()
    deadline = time.monotonic() + limit_s
    for end in ends:
        end.join(max(0.0, deadline - time.monotonic()))
    _providers.clear()
    provider_for.cache_clear()


def trace_requests(engine: AsyncLLM, model: str, provider: Any) -> RequestTracer:
    """Make a span of each request of `engine` from now on; `model` is its name in the pool."""
    tracer = RequestTracer(provider.get_tracer("tokenpool"), model)
    tracer.follow(engine.output_processor)
    engine.output_processor.tracing_enabled = True
    return tracer


class RequestTracer:
    """The open spans of one model's requests."""

    def __init__(self, tracer: Any, model: str) -> None:
        self._tracer = tracer
        self._model = model
        self._open: dict[str, tuple[Any, float, float]] = {}  # span, arrival and how long it was held, in s
        self._places: dict[str, str] = {}

    def follow(self, processor: OutputProcessor) -> None:
        """Hear of the requests that `processor` learns of, and of their ends."""
        add_request, abort_requests = processor.add_request, processor.abort_requests

        def add(request: EngineCoreRequest, *args: Any, **options: Any) -> None:
            add_request(request, *args, **options)
            self.begin(request)

        def abort(*args: Any, **options: Any) -> list[str]:
            aborted = abort_requests(*args, **options)
            for request_id in aborted:
                self.drop(request_id)
            return aborted

        processor.add_request, processor.abort_requests = add, abort
        processor.do_tracing = self.finish

    def begin(self, request: EngineCoreRequest) -> None:
        """Open the span of a request that is not known, and let the engine's answers carry its context."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if request.request_id in self._open:
            return
        call = CURRENT_CALL.get()
        attributes = {"gen_ai.request.model": self._model}
        if call is not None:
            attributes["tokenpool.tenant"] = call.account.config.name
        span = self._tracer.start_span(
            SPAN_NAME,
            context=extract_trace_context(request.trace_headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=_ns(request.arrival_time),
        )
        self._open[request.request_id] = span, request.arrival_time, call.held_s if call is not None else 0.0
        headers = {**(request.trace_headers or {}), SINCE: repr(request.arrival_time)}
        TraceContextTextMapPropagator().inject(headers, context=set_span_in_context(span))
        request.trace_headers = headers

    def sent(self, request_id: str, host: str) -> None:
        """`host` gets the request; if another one had it, it has moved."""
        if request_id in self._open and self._places.setdefault(request_id, host) != host:
            self._open[request_id][0].add_event("moved", {"from": self._places[request_id], "to": host})
            self._places[request_id] = host

    def finish(self, output: EngineCoreOutput, state: RequestState, iteration: IterationStats | None) -> None:
        """The last output of a request is there; takes the place of `OutputProcessor.do_tracing`."""
        known = self._take(state.request_id)
        if known is None:
            return
        span, arrival_s, held_s = known
        now_s = iteration.iteration_timestamp if iteration is not None else time.time()
        for name, value in _attributes(state, now_s).items():
            if value is not None:
                span.set_attribute(name, value)
        span.set_attribute("gen_ai.response.finish_reasons", [str(output.finish_reason)])
        phases = {"held": (arrival_s, arrival_s + held_s)} if held_s else {}
        for name, (start_s, end_s) in (phases | _phases(state.stats, arrival_s + held_s, now_s)).items():
            self._child(span, name, max(arrival_s, start_s), min(now_s, end_s))
        for kind, after_s, seconds, model in reversed(json.loads((output.trace_headers or {}).get(WAITS, "[]"))):
            start_s = arrival_s + after_s
            self._child(span, kind, max(arrival_s, start_s), min(now_s, start_s + seconds), {"tokenpool.model": model})
        if output.finish_reason is FinishReason.ERROR:
            _set_error(span, "the engine failed the request")
        span.end(_ns(now_s))

    def drop(self, request_id: str) -> None:
        """A request ends before its time: its client went away, or the pool gave it up."""
        if (known := self._take(request_id)) is not None:
            known[0].set_attribute("gen_ai.response.finish_reasons", [str(FinishReason.ABORT)])
            _set_error(known[0], "aborted")
            known[0].end()

    def close(self) -> None:
        """End what is open."""
        for request_id in list(self._open):
            self.drop(request_id)

    def _take(self, request_id: str) -> tuple[Any, float, float] | None:
        self._places.pop(request_id, None)
        return self._open.pop(request_id, None)

    def _child(
        self, parent: Any, name: str, start_s: float, end_s: float, attributes: Mapping[str, str] | None = None
    ) -> None:
        from opentelemetry.trace import set_span_in_context

        if end_s < start_s:
            return
        context = set_span_in_context(parent)
        span = self._tracer.start_span(name, context=context, start_time=_ns(start_s), attributes=attributes)
        span.end(_ns(end_s))


def _phases(stats: RequestStateStats | None, arrival_s: float, now_s: float) -> dict[str, tuple[float, float]]:
    """Start and end of each phase in wall-clock seconds; nothing without statistics.

    The engine's times are of its own monotonic clock. Its last output tells how that goes to this one's.
    """
    if stats is None or not stats.scheduled_ts:
        return {}
    offset_s = now_s - max(stats.last_token_ts, stats.first_token_ts)
    scheduled_s, first_s = stats.scheduled_ts + offset_s, stats.first_token_ts + offset_s
    found = {"queue": (arrival_s, scheduled_s), "prefill": (scheduled_s, first_s)}
    if stats.last_token_ts > stats.first_token_ts:
        found["decode"] = first_s, stats.last_token_ts + offset_s
    return found


def _attributes(state: RequestState, now_s: float) -> dict[str, Any]:
    """vLLM's attributes by vLLM's names; see OutputProcessor.do_tracing."""
    names, stats = SpanAttributes, state.stats
    found: dict[str, Any] = {
        names.GEN_AI_REQUEST_ID: state.external_req_id,
        names.GEN_AI_USAGE_PROMPT_TOKENS: state.prompt_len,
        names.GEN_AI_REQUEST_TOP_P: state.top_p or None,
        names.GEN_AI_REQUEST_MAX_TOKENS: state.max_tokens_param or None,
        names.GEN_AI_REQUEST_TEMPERATURE: state.temperature or None,
        names.GEN_AI_REQUEST_N: state.n or None,
    }
    if stats is None:
        return found
    return found | {
        names.GEN_AI_LATENCY_TIME_TO_FIRST_TOKEN: stats.first_token_latency,
        names.GEN_AI_LATENCY_E2E: now_s - stats.arrival_time,
        names.GEN_AI_LATENCY_TIME_IN_QUEUE: stats.scheduled_ts - stats.queued_ts,
        names.GEN_AI_USAGE_COMPLETION_TOKENS: stats.num_generation_tokens,
        names.GEN_AI_LATENCY_TIME_IN_MODEL_PREFILL: stats.first_token_ts - stats.scheduled_ts,
        names.GEN_AI_LATENCY_TIME_IN_MODEL_DECODE: max(0.0, stats.last_token_ts - stats.first_token_ts),
        names.GEN_AI_LATENCY_TIME_IN_MODEL_INFERENCE: max(0.0, stats.last_token_ts - stats.scheduled_ts),
    }


def _set_error(span: Any, what: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, what))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
