# SPDX-License-Identifier: Apache-2.0
"""Flags that parts of vLLM read which a pool does not have do their work all the same."""

from __future__ import annotations

import asyncio
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess
from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError
from tokenpool.serve.client import model_client
from tokenpool.serve.launch.launch_plan import plan_added

pytestmark = pytest.mark.vllm

PLUGIN = """
from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation, FunctionCall, ToolCall
from vllm.tool_parsers import ToolParser, ToolParserManager

@ToolParserManager.register_module("plugged")
class Plugged(ToolParser):
    def extract_tool_calls(self, model_output, request):
        call = ToolCall(function=FunctionCall(name="plugged", arguments="{}"))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=None)
"""


@pytest.mark.parametrize("given", [True, False])
def test_flags_of_the_client_reach_vllms_client(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that vLLM's entry gives to its client beside the config."""
    told: dict[str, Any] = {}

    def make(**options: Any) -> None:
        told.update(options)
        raise ValueError("this far")

    monkeypatch.setattr(model_client, "AsyncLLM", SimpleNamespace(from_vllm_config=make))
    monkeypatch.setattr(model_client, "handing_in", lambda core: nullcontext())
    flags = ("--aggregate-engine-logging", "--enable-log-requests", "--disable-log-stats")
    plan = plan_added(ModelSpec("m", "org/a", flags if given else ()), None)
    config = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=None))
    core: Any = SimpleNamespace(vllm_config=config, close=lambda: None)
    with pytest.raises(ConfigError, match="this far"):
        asyncio.run(model_client.ModelClient.over(plan, core, {}))

    names = ("aggregate_engine_logging", "enable_log_requests", "disable_log_stats")
    assert [given] * 3 == [told[name] for name in names]


def test_plugins_config_files_and_log_levels_work_in_all_processes(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The parser of a plugin parses in each frontend, flags of a file are a model's, the engine host logs as told."""
    plugin, config = tmp_path / "plugged.py", tmp_path / "flags.yaml"
    plugin.write_text(PLUGIN)
    flags = {"served-model-name": ["llama", "chat"], "enable-auto-tool-choice": True, "tool-call-parser": "plugged"}
    config.write_text(yaml.safe_dump(flags))
    args = {"config": str(config), "tool_parser_plugin": str(plugin), "log_level": "DEBUG"}
    models = [{"name": "llama", "model": str(tiny_models.path("llama")), "args": args}]
    with PoolServerProcess(
        {"models": models, "device_memory": "64MiB", "page_size": "1MiB", "frontends": 2, "api_key": "k" * 16}
    ) as server:
        tool = {"type": "function", "function": {"name": "plugged", "parameters": {"type": "object"}}}
        body = {"messages": [{"role": "user", "content": "hello"}], "tools": [tool], "max_tokens": 2}
        answer = server.request("POST", "/v1/chat/completions", json={"model": "chat", **body})

        assert answer.status_code == 200, answer.text
        assert "plugged" == answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"]
        assert re.search(r"DEBUG .*\[[a-z0-9/_]*core\.py", server.log), server.log[-3000:]
