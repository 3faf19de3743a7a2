# SPDX-License-Identifier: Apache-2.0
"""Costs come from profiles as they should, and estimates stay near what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tokenpool.errors import ConfigError
from tokenpool.sim.costs import (
    artifact_costs,
    costs_of,
    estimate_costs,
    fit_profiles,
    kind_on,
    load_costs,
    load_shapes,
    write_costs,
)
from tokenpool.sim.gpus import GPUS, gpu
from tokenpool.sim.workload import ModelCosts

pytestmark = pytest.mark.cpu

DATA = Path(__file__).parent / "data"
HEADER = "model,gpu,tp,input_len,batch,prefill_s_trim,decode_s_trim,clean"
H100 = gpu("h100-80g")
GRID = list(itertools.product((16, 128, 512), (1, 2, 4, 8)))


def write_profile(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def exact_rows(costs: ModelCosts, clean: int = 1, gpu_name: str = "H100") -> list[str]:
    """A profile of llama2-13b as a device with these costs would give it."""
    rows = []
    for input_len, batch in GRID:
        tokens = batch * input_len
        times = f"{costs.prefill(tokens, tokens * input_len)!r},{costs.step(batch, tokens)!r}"
        rows.append(f"llama2_13b_chat,{gpu_name},{costs.num_gpus},{input_len},{batch},{times},{clean}")
    return rows


def llama_costs(num_gpus: int = 1, prefill_per_token2_s: float = 2e-9) -> ModelCosts:
    shape = load_shapes()["llama2-13b"]
    kv_bytes = shape.kv_bytes_per_token(num_gpus)
    weight_bytes, slope_s = shape.weight_bytes(num_gpus), kv_bytes / H100.hbm_bytes_per_s
    return ModelCosts(weight_bytes, kv_bytes, 0.01, 4e-5, prefill_per_token2_s, 0.012, 1e-4, slope_s, num_gpus)


def test_pool_memory_solved_by_hand():
    """A pool gets nine tenths of the memory less 4 GB."""
    h200 = gpu("h200-141g")

    assert "h200" == h200.chip
    assert int(143_771 * 2**20 * 0.9) - 4_000_000_000 == h200.pool_bytes
    assert all(0 < spec.pool_bytes < spec.memory_bytes for spec in GPUS.values())


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    """The message says what there is."""
    with pytest.raises(ConfigError, match=r"gpu: no such GPU: 'h100'; known are a10-24g, .*h100-80g"):
        gpu("h100")


def test_shapes_solved_by_hand():
    """KV counts the heads of keys and values, not those of queries; four devices share it."""
    shapes = load_shapes()

    assert 2 * 28 * 4 * 128 * 2 == shapes["qwen2.5-7b"].kv_bytes_per_token()
    assert 2 * 48 * 4 * 128 * 2 == shapes["yi-9b"].kv_bytes_per_token()
    assert 2 * 40 * 40 * 128 * 2 == shapes["llama2-13b"].kv_bytes_per_token()
    assert 2 * 40 * 10 * 128 * 2 == shapes["llama2-13b"].kv_bytes_per_token(4)
    assert 2 * 28 * 1 * 128 * 2 == shapes["qwen2.5-7b"].kv_bytes_per_token(8)  # no less than a head
    assert 15_231_233_024 == shapes["qwen2.5-7b"].weight_bytes()


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_a_fit_finds_the_costs_that_made_the_profile(tmp_path, num_gpus):
    """From times without noise the coefficients come back, and the fit is perfect."""
    costs = llama_costs(num_gpus)
    (kind, fit), *rest = fit_profiles(write_profile(tmp_path / "p.csv", exact_rows(costs)), H100).items()

    assert [] == rest
    assert kind_on("llama2-13b", num_gpus) == kind
    assert pytest.approx(costs) == fit.costs
    assert pytest.approx((1.0, 0.0, len(GRID)), abs=1e-9) == fit.prefill
    assert pytest.approx((1.0, 0.0, len(GRID)), abs=1e-9) == fit.step


def test_no_coefficient_is_below_zero(tmp_path):
    """Times that bend down are fitted by a line, not by a parabola that ends below 0."""
    bent = exact_rows(llama_costs(prefill_per_token2_s=-1e-9))
    fit = fit_profiles(write_profile(tmp_path / "p.csv", bent), H100)["llama2-13b"]

    assert 0.0 == fit.costs.prefill_per_token2_s
    assert 0 < fit.costs.prefill_per_token_s < 4e-5
    assert 0.9 < fit.prefill.r2 < 1


def test_other_gpus_and_split_prefills_are_left_out(tmp_path):
    """Only clean rows of the chip count."""
    costs = llama_costs()
    nonsense = costs._replace(prefill_s=9.0, step_s=9.0)
    rows = exact_rows(nonsense, clean=0) + exact_rows(nonsense, gpu_name="A100") + exact_rows(costs, gpu_name="h100")

    assert pytest.approx(costs) == fit_profiles(write_profile(tmp_path / "p.csv", rows), H100)["llama2-13b"].costs


def test_a_measured_profile_is_fitted_well():
    """On a part of the artifact's points, steps agree within a few percent and prefills within a dozen."""
    fit = fit_profiles(DATA / "profile.csv", H100)["qwen2.5-7b"]

    assert 14 == fit.step.num_points == fit.prefill.num_points
    assert fit.step.median_rel_error < 0.03 and fit.step.r2 > 0.97
    assert fit.prefill.median_rel_error < 0.12 and fit.prefill.r2 > 0.95
    assert pytest.approx(load_costs("h100-80g")["qwen2.5-7b"].step_s, rel=0.02) == fit.costs.step_s


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gpt,H100,1,16,1,0.1,0.1,1", r"line 2: no shape for 'gpt'; known are baichuan-7b, "),
        ("qwen_7b,H100,1,16,1,fast,0.1,1", r"line 2: broken row: could not convert string to float: 'fast'"),
        ("qwen_7b,H100,1,16,0,0.1,0.1,1", r"line 2: counts and seconds must be above 0"),
        ("qwen_7b,H100,1,16,1,nan,0.1,1", r"line 2: counts and seconds must be above 0"),
        ("qwen_7b,H100,1,16,1,0.1,0.1,1", r"qwen-7b: has 1 clean points on h100-80g: give at least 4"),
    ],
)
def test_broken_profiles_are_refused(tmp_path, row, message):
    """The message names file, line and problem."""
    path = write_profile(tmp_path / "p.csv", [row])
    with pytest.raises(ConfigError, match=message) as error:
        fit_profiles(path, H100)
    assert str(path) == error.value.source


def test_files_that_are_no_profile_are_refused(tmp_path):
    """A missing file and a missing column are said."""
    with pytest.raises(ConfigError, match="cannot be read"):
        fit_profiles(tmp_path / "missing.csv", H100)
    (tmp_path / "p.csv").write_text("model,gpu,tp,input_len,batch\n")
    with pytest.raises(ConfigError, match="line 1: lacks prefill_s_trim, decode_s_trim, clean"):
        fit_profiles(tmp_path / "p.csv", H100)


def test_written_costs_are_read_back(tmp_path):
    """Fits of one's own are loaded like the shipped ones, to seven digits."""
    fits = fit_profiles(DATA / "profile.csv", H100)
    path = tmp_path / "costs.csv"
    write_costs(path, {"h100-80g": fits})

    assert {"qwen2.5-7b": pytest.approx(fits["qwen2.5-7b"].costs, rel=1e-6)} == load_costs("h100-80g", path)
    with pytest.raises(ConfigError, match="nothing was measured on h20-96g, only on h100-80g"):
        load_costs("h20-96g", path)
    path.write_text(path.read_text().replace(",15231233024,", ",heavy,"))
    with pytest.raises(ConfigError, match="line 2: broken row: .*heavy"):
        load_costs("h100-80g", path)


def test_all_published_profiles_are_shipped():
    """33 sets on single devices, and 8 models on two and four H800."""
    kinds = {name: load_costs(name) for name in ("a10-24g", "a100-80g", "h100-80g", "h20-96g", "h800-80g")}

    assert {"qwen2.5-7b", "yi-9b", "llama2-13b"} == set(kinds["h100-80g"]) == set(kinds["h20-96g"])
    assert [4, 9, 3, 3, 30] == [len(by_kind) for by_kind in kinds.values()]
    for num_gpus in (2, 4):
        assert 8 == sum(costs.num_gpus == num_gpus for costs in kinds["h800-80g"].values())


def test_shipped_costs_fit_their_models():
    """Sizes are those of models.csv, the slope is that of the bandwidth, and no time is below 0."""
    for name in ("a10-24g", "a100-80g", "h100-80g", "h20-96g", "h800-80g"):
        for kind, costs in load_costs(name).items():
            shape = load_shapes()[kind.partition("-tp")[0]]
            assert kind_on(kind.partition("-tp")[0], costs.num_gpus) == kind
            assert shape.weight_bytes(costs.num_gpus) == costs.weight_bytes
            assert shape.kv_bytes_per_token(costs.num_gpus) == costs.kv_bytes_per_token
            slope_s = costs.kv_bytes_per_token / gpu(name).hbm_bytes_per_s
            assert pytest.approx(slope_s, rel=1e-6) == costs.step_per_token_s
            assert min(costs) >= 0 < costs.step_per_request_s < 1e-3 < costs.step_s < 0.04


@pytest.mark.parametrize("kind", ["qwen2.5-7b", "yi-9b", "llama2-13b"])
def test_estimates_are_near_what_the_h100_does(kind):
    """Steps of 16 and prefills of 1,000 tokens are within a factor of 1.6, the rest as near as documented."""
    fitted, shape = load_costs("h100-80g")[kind], load_shapes()[kind]
    estimate = estimate_costs(shape.weight_bytes(), shape.kv_bytes_per_token(), H100)

    assert 1 / 1.6 < estimate.step(16, 16_000) / fitted.step(16, 16_000) < 1
    assert 0.95 < estimate.prefill(1000, 1000**2) / fitted.prefill(1000, 1000**2) < 1.15
    assert 0.95 < estimate.prefill(4000, 4000**2) / fitted.prefill(4000, 4000**2) < 1.3
    assert 0.7 < estimate.step_per_request_s / fitted.step_per_request_s < 1
    assert fitted.weight_bytes == estimate.weight_bytes


def test_an_estimate_solved_by_hand():
    """10 GB of weights on two devices of an H100: 5 GB at 0.75 of 3.35 TB/s, 1 ms and 2 ms beside that."""
    costs = estimate_costs(10e9, 1e5, H100, num_gpus=2)

    assert (5_000_000_000, 5e4, 2) == (costs.weight_bytes, costs.kv_bytes_per_token, costs.num_gpus)
    assert pytest.approx(0.003 + 5e9 / (0.75 * 3.35e12)) == costs.step_s == costs.prefill_s
    assert pytest.approx(10e9 / (0.7 * 2 * 989e12)) == costs.prefill_per_token_s
    assert pytest.approx(5e4 / 3.35e12) == costs.step_per_token_s
    with pytest.raises(ConfigError, match="must be above 0 bytes"):
        estimate_costs(0, 1, H100)
    with pytest.raises(ConfigError, match="num_gpus: must be at least 1, not 0"):
        estimate_costs(1, 1, H100, num_gpus=0)


def test_what_was_not_measured_is_estimated():
    """A kind gets the fit if there is one on that GPU, else the estimate for its shape."""
    h20 = gpu("h20-96g")
    shape = load_shapes()["qwen2.5-72b"]

    assert load_costs("h800-80g")["llama2-13b-tp4"] == costs_of("llama2-13b-tp4", "h800-80g")
    estimate = estimate_costs(shape.weight_bytes(), shape.kv_bytes_per_token(), h20, num_gpus=4)
    assert estimate == costs_of("qwen2.5-72b-tp4", "h20-96g")
    assert 4 == costs_of("llama2-13b-tp4", "h20-96g").num_gpus
    # With fewer KV heads than devices, each device holds one.
    assert 2 * 28 * 128 * 2 == costs_of("qwen2.5-7b-tp8", "h20-96g").kv_bytes_per_token


@pytest.mark.parametrize("kind", ["gpt", "llama2-13b-tp", "llama2-13b-tp0", "llama2-13b-tp1", "llama2-13b-tp4x", ""])
def test_unknown_kinds_are_refused(kind):
    """The message names the models there are."""
    with pytest.raises(ConfigError, match=r"kind: .* is no kind: write a model, or one with -tp4; known are baichuan"):
        costs_of(kind, "h100-80g")


def test_the_costs_of_the_artifact_solved_by_hand():
    """A switch takes weights / 16 GB/s there, 0.875 s for Qwen; KV counts 28 query heads instead of 4 KV heads."""
    models = artifact_costs()
    qwen, llama = models["qwen2.5-7b"], models["llama2-13b"]

    assert {"qwen2.5-7b", "yi-9b", "llama2-13b"} == set(models)
    assert 0.875 == qwen.costs.weight_bytes / (16 * 2**30)
    assert 1.625 == llama.costs.weight_bytes / (16 * 2**30)
    assert 7 * load_shapes()["qwen2.5-7b"].kv_bytes_per_token() == qwen.costs.kv_bytes_per_token
    assert load_shapes()["llama2-13b"].kv_bytes_per_token() == llama.costs.kv_bytes_per_token
    assert (8192, 141_236) == (qwen.max_seq_len, qwen.max_kv_tokens)
    assert pytest.approx(0.00858222632 - 7.614765e-05 + 2.58939596e-07 * 1000) == qwen.costs.step(-1, 1000)
    assert models["yi-9b"].costs.step_per_token_s < 0
