# SPDX-License-Identifier: Apache-2.0
"""Whatever grammar an engine meets first, each is compiled by the backend that its frontend has chosen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm.v1 import structured_output
from vllm.v1.structured_output import StructuredOutputManager

from tokenpool.host.engine.grammar_backends import use_all_backends

pytestmark = pytest.mark.vllm


class Backend:
    """Stands for a backend of vLLM's; says who compiled a grammar."""

    ended: ClassVar[list[str]] = []
    name = ""

    def __init__(self, vllm_config: Any, tokenizer: Any, vocab_size: int) -> None:
        pass

    def compile_grammar(self, kind: Any, spec: str, **_: Any) -> Any:
        names = {"spec": f"{spec} by {self.name}", "is_terminated": lambda: False, "fill_bitmask": lambda *_: None}
        return SimpleNamespace(**names)

    def allocate_token_bitmask(self, rows: int) -> torch.Tensor:
        return torch.zeros((rows, 1), dtype=torch.int32)

    def destroy(self) -> None:
        self.ended.append(self.name)


@pytest.fixture
def manager(monkeypatch):
    """A manager as an engine has it, with two stand-ins for backends."""
    Backend.ended = []
    for name, place in (("xgrammar", "XgrammarBackend"), ("guidance", "GuidanceBackend")):
        monkeypatch.setattr(structured_output, place, type(place, (Backend,), {"name": name}))
    made = StructuredOutputManager.__new__(StructuredOutputManager)
    model = SimpleNamespace(get_vocab_size=lambda: 8, skip_tokenizer_init=False)
    scheduler = SimpleNamespace(max_num_seqs=1)
    made.vllm_config = SimpleNamespace(model_config=model, scheduler_config=scheduler, num_speculative_tokens=0)
    made.backend, made.tokenizer, made._use_async_grammar_compilation = None, None, True
    made.executor, made.fill_bitmask_parallel_threshold = ThreadPoolExecutor(1), 128
    use_all_backends(made)
    yield made
    made.executor.shutdown()


def compiled(manager: StructuredOutputManager, spec: str, backend: str) -> str:
    structured = SimpleNamespace(structured_output_key=("regex", spec), grammar=None)
    params = SimpleNamespace(structured_outputs=SimpleNamespace(_backend=backend), all_stop_token_ids=set())
    manager.grammar_init(SimpleNamespace(request_id=spec, structured_output_request=structured, sampling_params=params))
    return structured.grammar.result(20)._grammar.spec


@pytest.mark.parametrize("first", ["xgrammar", "guidance"])
def test_the_first_request_does_not_choose_for_all(manager, first):
    """Requests of either backend before and after each other get their own."""
    second = {"xgrammar": "guidance", "guidance": "xgrammar"}[first]
    for spec, backend in (("a", first), ("b", second), ("c", first), ("d", second)):
        assert f"{spec} by {backend}" == compiled(manager, spec, backend)
    assert first == manager.backend.name, "what makes the bitmasks stays"


def test_a_backend_that_raises_no_exception_fails_its_request_alone(manager, monkeypatch):
    """Code in Rust raises what is no Exception when it panics; vLLM would raise it where the host asks who can step."""
    from vllm.v1.structured_output.request import StructuredOutputRequest

    class Panic(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    monkeypatch.setattr(Backend, "compile_grammar", panic)
    options = SimpleNamespace(_backend="guidance", regex="a", json=None, json_object=None)
    params = SimpleNamespace(structured_outputs=options, all_stop_token_ids=set())
    structured = StructuredOutputRequest(options)
    structured.structured_output_key = ("regex", "a")
    manager.grammar_init(SimpleNamespace(request_id="a", structured_output_request=structured, sampling_params=params))
    with pytest.raises(RuntimeError, match="cannot be compiled: Panic: index out of bounds"):
        structured._grammar.result(20)
    assert structured.is_grammar_ready
    assert isinstance(structured.grammar, RuntimeError)


def test_all_backends_end_with_the_engine(manager):
    """Each of them is released, once."""
    compiled(manager, "a", "guidance")
    compiled(manager, "b", "xgrammar")
    manager.clear_backend()
    assert ["guidance", "xgrammar"] == sorted(Backend.ended)
    assert manager.backend is None


def test_a_request_without_a_grammar_needs_no_backend(manager):
    """Nothing is made for it."""
    manager.grammar_init(SimpleNamespace(structured_output_request=None, sampling_params=None))
    assert manager.backend is None
