# SPDX-License-Identifier: Apache-2.0
"""`tokenpool sim` and `tokenpool plan`: they answer on the command line, and say in one line what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenpool.cli.main import main

pytestmark = pytest.mark.cpu

ROWS = "".join(f"{i},{500 * i},m{i % 6},qwen2.5-7b,{200 + i},{20 + i % 50}\n" for i in range(60))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text("req_id,arrival_ms,model,base_model,input_len,output_len\n" + ROWS)
    return str(path)


def sim(trace: str, policy: str = "slack", *more: str) -> list[str]:
    return ["sim", "--requests", trace, "--gpus", "2", "--gpu", "h100-80g", "--policy", policy, *more]


@pytest.mark.parametrize("policy", ["slack", "aegaeon", "sllm", "sllm+", "mux", "dedicated", "sleep", "round_robin"])
def test_each_system_answers(trace, policy, tmp_path, capsys):
    """Three attainments are printed, and all figures written."""
    out = tmp_path / "out.json"
    assert 0 == main(sim(trace, policy, "--prefill-gpus", "1", "--json", str(out)))

    text, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert "60 requests for 6 models on 2 x h100-80g" in text
    assert f"{figures['token_deadline_pct']:6.2f} %" in text
    assert {"artifact_slo_pct", "token_deadline_pct", "request_all_tokens_pct"} < figures.keys()
    assert 60 == figures["n_requests"]


def test_the_same_twice(trace, tmp_path):
    """Figures are equal but for the time that it took."""
    figures = []
    for name in ("a.json", "b.json"):
        main(sim(trace, "slack", "--json", str(tmp_path / name)))
        figures.append({k: v for k, v in json.loads((tmp_path / name).read_text()).items() if k != "wall_s"})

    assert figures[0] == figures[1]


def test_own_costs_of_models(trace, tmp_path, capsys):
    """A file of models gives kinds, or sizes for an estimate, by name or for all others."""
    models = tmp_path / "models.yaml"
    models.write_text("m0: yi-9b\n'*': {weights: 15GB, kv_bytes_per_token: 57344}\n")
    assert 0 == main(sim(trace, "slack", "--models", str(models)))
    assert "tokens on time" in capsys.readouterr().out


def test_costs_of_one_model_are_not_those_of_a_kind_of_its_name(tmp_path, capsys):
    """A model named like a kind may have sizes of its own; others of that kind keep theirs."""
    path, models = tmp_path / "t.csv", tmp_path / "models.yaml"
    path.write_text("arrival_ms,model,input_len,output_len\n0,qwen2.5-7b,10,5\n1,m1,10,5\n")
    models.write_text("qwen2.5-7b: {weights: 40GB, kv_bytes_per_token: 57344}\n'*': qwen2.5-7b\n")
    assert 0 == main(["plan", "--trace", str(path), "--gpu", "h100-80g", "--models", str(models)])

    text = capsys.readouterr().out
    assert "qwen2.5-7b on h100-80g: 14.19GiB" in text and "own costs of qwen2.5-7b on h100-80g: 37.25GiB" in text


def test_models_without_requests_have_an_instance(trace, tmp_path, capsys):
    """Ten more models that nobody asks for cost ten more dedicated GPUs, and none of a pool."""
    models, out = tmp_path / "models.yaml", tmp_path / "plan.json"
    models.write_text("".join(f"idle-{i}: yi-9b\n" for i in range(10)))
    words = ["plan", "--trace", trace, "--gpu", "h100-80g", "--models", str(models), "--json", str(out)]
    assert 0 == main(words)
    systems = json.loads(out.read_text())["systems"]
    assert (16, 1) == (systems["dedicated"]["gpus"], systems["slack"]["gpus"])


def test_rates_of_clients(tmp_path, capsys):
    """Each client is a model; the time must be given, and others have no rates to scale."""
    path, models = tmp_path / "clients.csv", tmp_path / "models.yaml"
    rows = "".join(f"{i},{600 * k},{1 / (i + 1)},1,Gamma,0.8,1\n" for i in range(4) for k in range(3))
    path.write_text("client,window_start_s,rate_rps,cv,distribution,param1,param2\n" + rows)
    models.write_text("'*': qwen2.5-7b\n")
    assert 2 == main(sim(str(path), "slack", "--models", str(models)))
    assert "give a time with --for" in capsys.readouterr().err
    part = ("--from", "10m", "--for", "1m", "--scale", "0.5")
    assert 0 == main(sim(str(path), "slack", "--models", str(models), *part))
    assert "for 4 models on 2 x h100-80g" in capsys.readouterr().out


def test_a_part_of_the_time(trace, capsys):
    """Requests of the trace that come in it, from its begin on."""
    assert 0 == main(sim(trace, "slack", "--from", "10s", "--for", "5s"))
    assert "10 requests for 6 models" in capsys.readouterr().out
    assert 2 == main(sim(trace, "slack", "--from", "1h"))
    assert "no requests in it in the time of --from and --for" in capsys.readouterr().err
    assert 2 == main(sim(trace, "slack", "--scale", "2"))
    assert "--scale is for files with rates of clients" in capsys.readouterr().err


def test_nothing_to_simulate(tmp_path, capsys):
    """A file without requests is an error, not a perfect score."""
    path = tmp_path / "empty.csv"
    path.write_text("arrival_ms,model,input_len,output_len\n")
    assert 2 == main(sim(str(path)))
    assert "no requests" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(trace, capsys):
    """One line, not a traceback."""
    pytest.importorskip("matplotlib")
    assert 2 == main(["plan", "--trace", trace, "--gpu", "h100-80g", "--png", "/nowhere/plan.png"])
    assert "cannot be written" in capsys.readouterr().err


def test_artifact_mode(trace, capsys):
    """It is for the artifact's kinds."""
    assert 0 == main(sim(trace, "sllm", "--artifact-mode"))
    assert "tokens on time" in capsys.readouterr().out


def test_a_plan(trace, tmp_path, capsys):
    """GPUs by system, what was assumed, JSON and a picture."""
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", "--trace", trace, "--gpu", "h100-80g", "--json", str(out), "--png", str(png)]
    assert 0 == main(words)

    text, answer = capsys.readouterr().out, json.loads(out.read_text())
    assert 6 == answer["systems"]["dedicated"]["gpus"] > answer["systems"]["slack"]["gpus"]
    assert "dedicated" in text and "assumed:" in text
    assert b"PNG" == png.read_bytes()[1:4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--policy", "fastest"), "no such system"),
        (("--gpu", "h1000"), "h1000"),
        (("--requests", "nowhere.csv"), "nowhere.csv"),
        (("--ttft", "soon"), "soon"),
        (("--models", "nowhere.yaml"), "nowhere.yaml"),
        (("--gpus", "0"), "at least 1"),
        (("--speed", "1"), "--speed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace, change, message, capsys):
    """Exit status 2, the culprit by name."""
    assert 2 == main([*sim(trace), *change])

    text = capsys.readouterr().err
    assert message in text and 1 == len(text.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m0: gpt-99\n", "gpt-99"),
        ("m0: {weights: 15GB}\n", "kv_bytes_per_token"),
        ("m0: {weights: 15GB, kv_bytes_per_token: 1000, gpus: 2}\n", "unknown"),
        ("m0: {weights: 150GB, kv_bytes_per_token: 1000}\n", "no room"),
        ("- m0\n", "mapping"),
        ("m9: [1]\n", "m9"),
    ],
)
def test_a_wrong_file_of_models(trace, tmp_path, text, message, capsys):
    """The model and the key are named."""
    path = tmp_path / "models.yaml"
    path.write_text(text)
    assert 2 == main(sim(trace, "slack", "--models", str(path)))
    assert message in capsys.readouterr().err
