# SPDX-License-Identifier: Apache-2.0
"""Traces of every known layout are read alike, and broken ones are refused with the place."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.errors import ConfigError
from tokenpool.sim.traces.client_windows import client_requests, read_client_windows
from tokenpool.sim.traces.trace_files import read_requests, read_trace_file, write_requests
from tokenpool.sim.workload import SimRequest, Workload

pytestmark = pytest.mark.cpu

DATA = Path(__file__).parent / "data"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
SIM = "req_id,arrival_ms,model,base_model,input_len,output_len\n"
BENCH = "arrival_ms,model,input_len,output_len\n"
AEGAEON = "Request Time,Model Name,Input Length,Output Length\n"

REQUEST = st.builds(
    SimRequest,
    st.floats(0, 1e7, allow_nan=False) | st.integers(0, 10**7).map(lambda ms: ms / 1e3),
    st.sampled_from(["a", "b,c", 'd"e']),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
)


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_what_the_artifact_simulator_replays():
    """The layout `sim` has kinds of its own."""
    trace = read_trace_file(DATA / "sim.csv")

    assert ("sim", 0) == (trace.layout, trace.num_dropped)
    assert 15 == len(trace.workload.requests)
    assert SimRequest(0.418, "synth_model_08", 436, 211) == trace.workload.requests[0]
    assert SimRequest(16.995, "synth_model_00", 1344, 461) == trace.workload.requests[-1]
    assert "qwen2.5-7b" == trace.workload.kinds["synth_model_08"]
    assert "yi-9b" == trace.workload.kinds["synth_model_03"]


def test_workloads_of_the_artifact():
    """Kinds follow from the last digit of the model's number."""
    workload = read_requests(DATA / "aegaeon.csv")

    assert SimRequest(0.054, "synth_model_46", 1514, 380) == workload.requests[0]
    assert SimRequest(1.821, "synth_model_34", 527, 285) == workload.requests[-1]
    expected = {"46": "yi-9b", "72": "qwen2.5-7b", "28": "llama2-13b", "69": "llama2-13b", "54": "qwen2.5-7b"}
    assert expected == {number: workload.kinds[f"synth_model_{number}"] for number in expected}


def test_long_clocks_and_other_names(tmp_path):
    """Hours may pass a day; a model of another name is its own kind."""
    workload = read_requests(write(tmp_path, AEGAEON + "25:01:02.5,mine,3,4\n"))

    assert [SimRequest(90_062.5, "mine", 3, 4)] == workload.requests
    assert {"mine": "mine"} == workload.kinds


def test_traces_of_our_benchmarks(tmp_path):
    """Fractions of milliseconds count, columns may come in any order, and the kind is the name."""
    trace = read_trace_file(write(tmp_path, "model,output_len,input_len,arrival_ms\nm,7,5,1500.5\n"))

    assert ("bench", [SimRequest(1.5005, "m", 5, 7)], {"m": "m"}) == (trace.layout, *workload_of(trace))


def workload_of(trace) -> tuple[list[SimRequest], dict[str, str]]:
    return trace.workload.requests, trace.workload.kinds


@pytest.mark.parametrize(
    "times",
    [
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319600"),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.061930+00:00"),
        ("2024-05-10 02:00:00+02:00", "2024-05-10 00:00:00.052+00:00"),
    ],
)
def test_traces_of_azure(tmp_path, times):
    """Time counts from the first request, with up to seven digits and offsets; the file names the model."""
    rows = f"{times[0]},4808,10\n{times[1]},3180,8\n"
    trace = read_trace_file(write(tmp_path, AZURE + rows, "code.csv"))

    expected = [SimRequest(0.0, "code", 4808, 10), SimRequest(0.052, "code", 3180, 8)]
    assert ("azure", expected, {"code": "code"}) == (trace.layout, *workload_of(trace))


def test_traces_of_burstgpt(tmp_path):
    """Time counts from the first request; both models are there."""
    rows = "5,ChatGPT,472,18,490,Conversation log\n45.25,GPT-4,1087,230,1317,API log\n"
    trace = read_trace_file(write(tmp_path, BURST + rows))

    expected = [SimRequest(0.0, "ChatGPT", 472, 18), SimRequest(40.25, "GPT-4", 1087, 230)]
    assert ("burstgpt", expected) == (trace.layout, trace.workload.requests)
    assert {"ChatGPT": "ChatGPT", "GPT-4": "GPT-4"} == trace.workload.kinds


def test_failures_in_logs_are_left_out_and_counted(tmp_path):
    """A row without answer or prompt is no request, and the time counts from the first one kept."""
    rows = "5,ChatGPT,472,0,472,API log\n7,ChatGPT,10,1,11,API log\n9,GPT-4,0,4,4,API log\n"
    trace = read_trace_file(write(tmp_path, BURST + rows))

    assert ([SimRequest(0.0, "ChatGPT", 10, 1)], {"ChatGPT": "ChatGPT"}) == workload_of(trace)
    assert 2 == trace.num_dropped


def test_rows_out_of_order_are_sorted(tmp_path):
    """Requests come by arrival; those of one time stay in their order."""
    workload = read_requests(write(tmp_path, BENCH + "20,b,1,1\n10,a,2,2\n20,a,3,3\n"))

    assert [(0.01, "a"), (0.02, "b"), (0.02, "a")] == [request[:2] for request in workload.requests]


def test_blank_lines_and_byte_order_marks_do_not_matter(tmp_path):
    """Files of spreadsheets are read too."""
    workload = read_requests(write(tmp_path, "\ufeff" + BENCH.replace("\n", "\r\n") + "10,a,2,2\r\n\r\n"))

    assert [SimRequest(0.01, "a", 2, 2)] == workload.requests


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
@settings(max_examples=50, deadline=None)
@given(requests=st.lists(REQUEST, max_size=20).map(lambda requests: sorted(requests, key=lambda r: r.arrival_s)))
def test_a_written_workload_is_read_back(tmp_path_factory, name, requests):
    """Every request and kind is the same, to the last digit of its arrival."""
    workload = Workload(requests, {request.model: f"kind of {request.model}" for request in requests})
    path = tmp_path_factory.mktemp("trace") / name
    write_requests(path, workload)

    assert workload == read_requests(path)


def test_what_is_written(tmp_path):
    """Whole milliseconds are written as such."""
    path = tmp_path / "trace.csv"
    write_requests(path, Workload([SimRequest(0.418, "m", 5, 7), SimRequest(2.0, "m", 1, 2)], {"m": "k"}))

    assert SIM + "0,418,m,k,5,7\n1,2000,m,k,1,2\n" == path.read_text()


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        (SIM, "0,418,m,k,5", "6 fields, arrival_ms such as 418, whole input_len and output_len from 1"),
        (SIM, "0,418,m,,5,7", "6 fields"),
        (BENCH, "soon,m,5,7", "arrival_ms such as 418"),
        (BENCH, "-1,m,5,7", "arrival_ms such as 418"),
        (BENCH, "nan,m,5,7", "arrival_ms such as 418"),
        (BENCH, "inf,m,5,7", "arrival_ms such as 418"),
        (BENCH, "sNaN,m,5,7", "arrival_ms such as 418"),
        (BENCH, "1e999999999,m,5,7", "arrival_ms such as 418"),
        (BENCH, "1,m,0,7", "whole input_len and output_len from 1"),
        (BENCH, "1,m,5,7.5", "whole input_len and output_len from 1"),
        (AEGAEON, "12.5,m,5,7", "Request Time such as 00:00:01.250"),
        (AEGAEON, "00:61:00,m,5,7", "Request Time such as 00:00:01.250"),
        (AZURE, "yesterday,5,7", "TIMESTAMP such as 2023-11-16 18:17:03.9799600"),
        (AZURE, "2023-11-16 18:17:03,5,-7", "whole ContextTokens and GeneratedTokens from 0"),
        (BURST, "x,ChatGPT,5,7,12,API log", "Timestamp such as 45"),
    ],
)
def test_broken_rows_are_refused(tmp_path, header, row, expected):
    """The message names file and line, shows the row and says what is expected."""
    good = {SIM: "0,1,m,k,1,1", BENCH: "0,m,1,1", AEGAEON: "0:0:1,m,1,1", AZURE: "2023-11-16,1,1", BURST: "0,m,1,1,2,l"}
    path = write(tmp_path, f"{header}{good[header]}\n{row}\n")
    with pytest.raises(ConfigError) as error:
        read_requests(path)

    assert (str(path), "line 3") == (error.value.source, error.value.key)
    assert f"broken row {row!r}: expected" in error.value.problem
    assert expected in error.value.problem


def test_a_model_of_two_kinds_is_refused(tmp_path):
    """The message names both kinds."""
    path = write(tmp_path, SIM + "0,1,m,a,1,1\n1,2,m,b,1,1\n")
    with pytest.raises(ConfigError, match="line 3: model 'm' is of kind 'b' here and of 'a' above"):
        read_requests(path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_unknown_headers_are_refused(tmp_path, text):
    """The message lists the columns of every layout."""
    message = "line 1: unknown header .*give the columns of one of arrival_ms.*; Timestamp"
    with pytest.raises(ConfigError, match=message):
        read_requests(write(tmp_path, text))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    """Missing files, broken archives and bytes that are no text are one kind of error."""
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"arrival_ms,model,input_len,output_len\n" * 9)[:-12])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    plain = tmp_path / "plain.csv.gz"
    plain.write_text(BENCH)
    for path in (tmp_path / "missing.csv", cut, binary, plain):
        with pytest.raises(ConfigError, match=r"\.csv(\.gz)?: cannot be read: "):
            read_requests(path)


def test_prism_and_mooncake(tmp_path):
    """Seconds with names, and JSON lines in milliseconds without; the first request kept arrives at 0."""
    prism = write(tmp_path, "arrival_s,model,prompt_tokens,output_tokens\n2.5,a,13,199\n3.0,b,36,0\n4.0,a,5,6\n")
    trace = read_trace_file(prism)
    assert ("prism", 1) == (trace.layout, trace.num_dropped)
    assert [SimRequest(0.0, "a", 13, 199), SimRequest(1.5, "a", 5, 6)] == trace.workload.requests

    line = '{"timestamp": %d, "input_length": 40, "output_length": 6, "hash_ids": [1, 2]}\n'
    trace = read_trace_file(write(tmp_path, line % 3000 + line % 4500, "conv.jsonl.gz"))
    assert ("mooncake", {"conv": "conv"}) == (trace.layout, trace.workload.kinds)
    blocks = (1, 2)
    expected = [SimRequest(0.0, "conv", 40, 6, blocks), SimRequest(1.5, "conv", 40, 6, blocks)]
    assert expected == trace.workload.requests

    line = '{"timestamp": 1, "input_length": 40, "output_length": 6}\n'
    assert [SimRequest(0.0, "t", 40, 6)] == read_requests(write(tmp_path, line, "t.jsonl")).requests


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"timestamp": 1}',
        '{"timestamp": -1, "input_length": 1, "output_length": 1}',
        '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["x"]}',
        '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 1}',
    ],
)
def test_a_broken_json_line_is_named(tmp_path, line):
    good = '{"timestamp": 1, "input_length": 1, "output_length": 1}\n'
    with pytest.raises(ConfigError, match="line 2"):
        read_requests(write(tmp_path, good + line + "\n", "t.jsonl"))


# -- rates of clients ------------------------------------------------------------------------------------

CLIENTS = "client,window_start_s,rate_rps,cv,distribution,param1,param2\n"


def test_clients_become_models(tmp_path: Path):
    """Each asks as often as its rates say, in the windows that lie in the time, and never twice alike by chance."""
    rows = "0,0,2.0,1.0,Gamma,1.0,9\n0,600,0.5,2.9,Weibull,0.43,9\n7,600,1.0,1.2,Gamma,0.75,9\n"
    windows = read_client_windows(write(tmp_path, CLIENTS + rows, "clients.csv.gz"))
    made = client_requests(windows, from_s=300.0, span_s=900.0, seed=1)
    counts = [
        sum(r.model == name and from_s <= r.arrival_s < from_s + span_s for r in made.requests)
        for name, from_s, span_s in (
            ("client-0", 0, 300),
            ("client-0", 300, 600),
            ("client-7", 0, 300),
            ("client-7", 300, 600),
        )
    ]
    assert 500 < counts[0] < 700 and 150 < counts[1] < 450 and counts[2] == 0 and 480 < counts[3] < 720
    assert made == client_requests(windows, from_s=300.0, span_s=900.0, seed=1)
    tenth = client_requests(windows, from_s=300.0, span_s=900.0, seed=1, scale=0.1)
    assert 0.05 < len(tenth.requests) / len(made.requests) < 0.2


@pytest.mark.parametrize(
    "row", ["0,0,-1,1,Gamma,1,1", "0,0,1,1,Normal,1,1", "0,x,1,1,Gamma,1,1", "0,0,1,1,Gamma,0,1", "0,0"]
)
def test_broken_rates_are_refused_with_their_line(tmp_path: Path, row: str):
    """The message says what a row holds."""
    path = write(tmp_path, CLIENTS + "0,0,1,1,Gamma,1,1\n" + row + "\n")
    with pytest.raises(ConfigError, match=r"line 3.*broken row: expected a client"):
        read_client_windows(path)


def test_rates_are_no_requests(tmp_path: Path):
    """Who wants requests of them is told which flag is missing."""
    path = write(tmp_path, CLIENTS + "0,0,1,1,Gamma,1,1\n")
    with pytest.raises(ConfigError, match="--for"):
        read_requests(path)
    with pytest.raises(ConfigError, match="no client asks for anything from 700 s on"):
        client_requests(read_client_windows(path), from_s=700.0, span_s=60.0, seed=1)


def test_columns_of_swissai(tmp_path: Path):
    """Requests that failed have no tokens, and are left out."""
    header = "id,status,created_at,finished_at,model,model_parameters,reported_token_input,reported_token_output\n"
    rows = "a,success,2025-01-31 18:17:03.5+00:00,x,big,70B,100,20\nb,error,2025-01-31 18:17:04+00:00,x,big,70B,,\n"
    rows += "c,success,2025-01-31 18:17:05.25+00:00,x,small,8B,7,3\n"
    trace = read_trace_file(write(tmp_path, header + rows))
    assert ("swissai", 1) == (trace.layout, trace.num_dropped)
    assert [SimRequest(0.0, "big", 100, 20), SimRequest(1.75, "small", 7, 3)] == trace.workload.requests
