# SPDX-License-Identifier: Apache-2.0
"""The GPU benches on a machine without a GPU: they say so, and what can be run of them runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench.gpu import goodput, link, rig, switch
from tests.helpers.fake_cuda import FakeCudaDevice
from tokenpool.host import cuda_copies
from tokenpool.memory import device_cuda

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("bench", [link, switch, goodput], ids=lambda bench: bench.__name__)
def test_a_bench_without_a_device_measures_nothing(bench, no_gpu, capsys, tmp_path):
    """It ends with a status of its own, one line, and no result file."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--json", str(tmp_path / "result.json")])

    assert 3 == ended.value.code
    assert "no CUDA device: nothing was measured\n" == capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there IS a GPU: the script would run for minutes")
def test_all_benches_without_a_device_measure_nothing(tmp_path):
    """The script ends with the same status before it writes anything."""
    script = ROOT / "bench/gpu/run_all.sh"
    ran = subprocess.run([script, tmp_path / "out"], capture_output=True, text=True, check=False, timeout=60)

    assert (3, "", "no CUDA device: nothing was measured\n") == (ran.returncode, ran.stdout, ran.stderr)
    assert not (tmp_path / "out").exists()


def test_the_limits_of_all_checks_fit_in_nine_minutes():
    """Each check has a limit, and together they end before ten minutes are over."""
    lines = (ROOT / "bench/gpu/run_all.sh").read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if line.startswith("check ")]

    assert len(limits) >= 8
    assert sum(limits) <= 9 * 60


def test_the_link_bench_runs_to_its_end(monkeypatch, tmp_path, capsys):
    """On a device of memory files every part of it runs, and all its numbers are there."""
    monkeypatch.setattr(rig, "require_cuda", lambda: None)
    monkeypatch.setattr(rig, "describe_gpu", lambda: {"name": "none"})
    monkeypatch.setattr(device_cuda, "CudaDevice", FakeCudaDevice)
    monkeypatch.setattr(cuda_copies, "BATCH_COPIES", {"each": None, "broken": lambda copies, stream: 1 / 0})
    monkeypatch.setattr(link, "BLOCK_KIB", (4, 64))
    link.main(["--mib", "4", "--page-mib", "2", "--repeats", "2", "--json", str(tmp_path / "link.json")])
    values = json.loads((tmp_path / "link.json").read_text())["values"]

    assert {"4KiB each in", "4KiB each out"} == values["blocks_gbs"].keys(), "256 blocks of 64 KiB do not fit"
    assert [[0, "each"]] == values["copy_ways"]
    assert len(link.CHUNKS_MIB) * 3 == len(values["h2d_gbs_of"])
    assert values["h2d_gbs"] > 0 < values["d2h_gbs"]
    printed = capsys.readouterr()
    assert "4KiB broken out: ZeroDivisionError" in printed.err
    assert "result: h2d_gbs=" in printed.out


def test_a_shape_has_the_size_of_its_model():
    """Llama 3.1 8B has 8,030,261,248 parameters and keeps 128 KiB of KV for each token."""
    assert 2 * 8_030_261_248 == rig.weight_bytes("8b")
    assert 128 << 10 == rig.kv_bytes_per_token("8b")
