# SPDX-License-Identifier: Apache-2.0
"""What a model costs on a device: fitted to measured profiles where there are some, else estimated from its size.

    load_costs("h100-80g")["qwen2.5-7b"]       the fits that are shipped
    costs_of("qwen2.5-72b-tp4", "h20-96g")     a shipped fit if there is one, else the estimate
    fit_profiles("mine.csv", gpu("h100-80g"))  fits of your own; `write_costs` keeps them for `load_costs`
    artifact_costs()                           what Aegaeon's published simulator computes with

A kind is the name of a model, with `-tp4` behind it for an instance on four devices. Where the tables come from, and
what they do not say, is in data/README.md. Needs neither vLLM nor torch nor numpy.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.policy.least_squares import non_negative
from tokenpool.sim.gpus import GpuSpec, gpu
from tokenpool.sim.workload import ModelCosts

_DATA = resources.files("tokenpool.sim") / "data"
_PROFILE_COLUMNS = ("model", "gpu", "tp", "input_len", "batch", "prefill_s_trim", "decode_s_trim", "clean")
_QUALITY_COLUMNS = ("prefill_r2", "prefill_median_rel_error", "step_r2", "step_median_rel_error")
_MIN_POINTS = 4
_BYTES_PER_NUMBER = 2  # bf16 and fp16

_HBM_FRAC = 0.75
_FLOPS_FRAC = 0.7
_ATTENTION_FLOPS_FRAC = 0.35
_STEP_OVERHEAD_S = 1e-3
_REQUEST_OVERHEAD_S = 40e-6
_ALL_REDUCE_S = 2e-3
_LAYER_WIDTHS = 0.037
"""Layers times hidden size over params ** (2/3): 0.037 to 0.038 for Llama-2 and Qwen2.5-72B, 0.026 (Qwen2.5-7B) to
0.046 (Yi-1.5-9B) in models.csv."""


class ModelShape(NamedTuple):
    """The numbers of a model that its memory follows from; weights and KV are of 2 bytes per number."""

    params: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def weight_bytes(self, num_gpus: int = 1) -> int:
        """Weights on each of `num_gpus` devices."""
        return math.ceil(self.params * _BYTES_PER_NUMBER / num_gpus)

    def kv_bytes_per_token(self, num_gpus: int = 1) -> int:
        """Keys and values of one token on each of `num_gpus` devices; each holds at least one head."""
        return 2 * self.num_layers * math.ceil(self.num_kv_heads / num_gpus) * self.head_dim * _BYTES_PER_NUMBER


class FitQuality(NamedTuple):
    """How well fitted times agree with the measured ones."""

    r2: float
    """Share of the variance of the times that is explained; 1 is perfect."""
    median_rel_error: float
    """Median of |fitted - measured| / measured."""
    num_points: int


class Fit(NamedTuple):
    """Costs of one kind as fitted to a profile."""

    costs: ModelCosts
    prefill: FitQuality
    step: FitQuality


class ArtifactModel(NamedTuple):
    """One model as the simulator of Aegaeon's artifact sees it."""

    costs: ModelCosts
    max_seq_len: int
    """Longest request in tokens, prompt and answer together."""
    max_kv_tokens: int
    """Tokens whose KV a device holds beside this model."""


@functools.cache
def load_shapes() -> Mapping[str, ModelShape]:
    """Return the shapes of the models in models.csv, by name."""
    rows = [row for _, row in _rows(_DATA / "models.csv")]
    return MappingProxyType({row["kind"]: ModelShape(*(int(row[x]) for x in ModelShape._fields)) for row in rows})


def fit_profiles(path: str | os.PathLike[str], on: GpuSpec) -> dict[str, Fit]:
    """Fit the rows of a profile that were taken on the chip of `on`; returns the fits by kind.

    The file has a header with model, gpu, tp, input_len, batch, prefill_s_trim, decode_s_trim and clean, in any
    order: tokens per prompt, prompts, and seconds per prefill of the batch and per decode step. Rows with clean other
    than 1 are left out. Least squares of the relative errors, no coefficient below 0. The share of a context token in
    a decode step is not fitted, since a few thousand tokens do not show it: it is the time to read its KV at peak
    bandwidth.

    Raises ConfigError for a broken file, a model that is not in models.csv, and a kind with less than 4 points.
    """
    source = Path(path)
    names = {row["kind"]: [row["kind"], *row["profile_names"].split()] for _, row in _rows(_DATA / "models.csv")}
    models = {name: model for model, aliases in names.items() for name in aliases}
    points: dict[tuple[str, int], list[_Point]] = {}
    for line, row in _rows(source, _PROFILE_COLUMNS):
        if row["gpu"].lower() not in (on.chip, on.name) or row["clean"] != "1":
            continue
        with _errors_at(source, line):
            known = ", ".join(names)
            check_setting(row["model"] in models, None, f"no shape for {show(row['model'])}; known are {known}")
            num_gpus, batch, input_len = int(row["tp"]), int(row["batch"]), int(row["input_len"])
            point = _Point(batch, input_len, float(row["prefill_s_trim"]), float(row["decode_s_trim"]))
            in_range = all(0 < value < math.inf for value in (num_gpus, *point))
            check_setting(in_range, None, f"counts and seconds must be above 0, not {(num_gpus, *point)}")
        points.setdefault((models[row["model"]], num_gpus), []).append(point)
    fits = {}
    for (model, num_gpus), found in points.items():
        kind = kind_on(model, num_gpus)
        if len(found) < _MIN_POINTS:
            problem = f"has {len(found)} clean points on {on.name}: give at least {_MIN_POINTS}"
            raise ConfigError(problem, key=kind, source=str(source))
        fits[kind] = _fit(load_shapes()[model], num_gpus, found, on)
    return fits


def write_costs(path: str | os.PathLike[str], fits: Mapping[str, Mapping[str, Fit]]) -> None:
    """Write fits, by name of the GPU and then by kind, as a table that `load_costs` reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "gpu", *ModelCosts._fields, "num_points", *_QUALITY_COLUMNS))
        for gpu_name, by_kind in sorted(fits.items()):
            for kind, fit in sorted(by_kind.items()):
                costs = (f"{value:.7g}" if isinstance(value, float) else value for value in fit.costs)
                quality = (f"{value:.4f}" for part in fit[1:] for value in part[:2])
                writer.writerow((kind, gpu_name, *costs, fit.step.num_points, *quality))


def load_costs(gpu_name: str, path: str | os.PathLike[str] | None = None) -> dict[str, ModelCosts]:
    """Return the fitted costs on a GPU by kind, from the shipped table or one by `write_costs`.

    Raises ConfigError for a GPU that is not in `GPUS` or not in the table, and for a broken table.
    """
    name = gpu(gpu_name).name
    source = _DATA / "costs.csv" if path is None else Path(path)
    found, names = {}, set()
    for line, row in _rows(source, ("kind", "gpu", *ModelCosts._fields)):
        names.add(row["gpu"])
        if row["gpu"] == name:
            with _errors_at(source, line):
                found[row["kind"]] = _costs(row)
    measured = ", ".join(sorted(names)) or "no GPU"
    check_setting(bool(found), "gpu", f"nothing was measured on {name}, only on {measured}; costs_of estimates")
    return found


@functools.cache
def artifact_costs() -> Mapping[str, ArtifactModel]:
    """Return what the published simulator of Aegaeon computes with, by kind, for its H100 of 80 GB.

    Only for a comparison with it. It calls its decode predictor with batch = -1, so its step of any batch takes
    `costs.step(-1, context)`. It counts KV of all query heads for models with fewer KV heads. Its coefficients include
    negative ones, from points whose prefill had been split: long prompts come out too cheap, and steps of yi-9b get
    shorter with context. Its GB is 2**30 bytes here, so take 2**30 for its 16 GB/s of PCIe too.

    Source: coefficients and constants of the artifact's simulator, see data/README.md.
    """
    models = {}
    for _, row in _rows(_DATA / "artifact_costs.csv"):
        sizes = {
            "weight_bytes": str(int(row["weight_gib"]) << 30),
            "kv_bytes_per_token": str(float(row["kv_gib_per_token"]) * 2**30),
        }
        costs = _costs(row | sizes | {"num_gpus": "1"})
        models[row["kind"]] = ArtifactModel(costs, int(row["max_seq_len"]), int(row["max_kv_tokens"]))
    return MappingProxyType(models)


def estimate_costs(weight_bytes: float, kv_bytes_per_token: float, on: GpuSpec, num_gpus: int = 1) -> ModelCosts:
    """Estimate what a dense bf16 model costs that nobody has measured; sizes are those of all devices together.

        step             1 ms + weights at 0.75 of peak bandwidth, + 2 ms of all-reduces on several devices
        prefill          the same + its products at 0.7 of peak FLOPs + attention at half of that
        each request     products of one token + 40 us
        context token    its KV at peak bandwidth

    Against the fits of dense models on one H100 or H800, the estimate is 0.6 to 0.95 of a step, least for many layers
    (yi-9b), since those engines ran eagerly and waited for launches; 0.8 to 1.15 of a prefill of 1,000 tokens and 1.3
    of one of 4,000 at most; 0.45 to 0.95 of a request's share. On the A100 and the A10 it is 0.8 to 1.05 of a step and
    0.75 to 1.4 of a prefill; on the H20 half of a step, because that profile reads weights at 0.3 of peak bandwidth.
    On two and four devices it is 0.3 to 0.5 of a step: those profiles hardly get faster with devices, for the same
    reason. A mixture of experts is taken for a dense model, so its prefill comes out 2 to 5 times too long.
    """
    check_setting(min(weight_bytes, kv_bytes_per_token) > 0, None, "weights and KV per token must be above 0 bytes")
    check_setting(num_gpus >= 1, "num_gpus", f"must be at least 1, not {show(num_gpus)}")
    params = weight_bytes / _BYTES_PER_NUMBER
    flops_per_s = on.bf16_flops_per_s * num_gpus
    token_s = 2 * params / (_FLOPS_FRAC * flops_per_s)
    step_s = _STEP_OVERHEAD_S + weight_bytes / num_gpus / (_HBM_FRAC * on.hbm_bytes_per_s)
    if num_gpus > 1:
        step_s += _ALL_REDUCE_S
    kv_bytes = kv_bytes_per_token / num_gpus
    return ModelCosts(
        weight_bytes=math.ceil(weight_bytes / num_gpus),
        kv_bytes_per_token=kv_bytes,
        prefill_s=step_s,
        prefill_per_token_s=token_s,
        prefill_per_token2_s=attention_s(weight_bytes, on, num_gpus),
        step_s=step_s,
        step_per_request_s=token_s + _REQUEST_OVERHEAD_S,
        step_per_token_s=kv_bytes / on.hbm_bytes_per_s,
        num_gpus=num_gpus,
    )


def attention_s(weight_bytes: float, on: GpuSpec, num_gpus: int = 1) -> float:
    """Seconds of attention per token squared of a prompt, as `estimate_costs` has it."""
    params = weight_bytes / _BYTES_PER_NUMBER
    # Two products of hidden size per layer and pair of tokens, two operations each, half of the pairs masked.
    return 2 * _LAYER_WIDTHS * params ** (2 / 3) / (_ATTENTION_FLOPS_FRAC * on.bf16_flops_per_s * num_gpus)


def costs_of(kind: str, gpu_name: str) -> ModelCosts:
    """Return the costs of a kind such as `qwen2.5-7b` or `qwen2.5-72b-tp4`: fitted if measured, else estimated.

    Raises ConfigError for a GPU that is not in `GPUS` and for a model that is not in models.csv.
    """
    on = gpu(gpu_name)
    fitted = _shipped_costs().get((on.name, kind))
    if fitted is not None:
        return fitted
    model, _, suffix = kind.partition("-tp")
    num_gpus = int(suffix) if suffix.isdecimal() else 1
    shape = load_shapes().get(model)
    if shape is None or num_gpus < 1 or kind != kind_on(model, num_gpus):
        known = ", ".join(load_shapes())
        raise ConfigError(f"{show(kind)} is no kind: write a model, or one with -tp4; known are {known}", key="kind")
    return estimate_costs(shape.weight_bytes(), shape.kv_bytes_per_token(num_gpus) * num_gpus, on, num_gpus)


def kind_on(model: str, num_gpus: int) -> str:
    """Return the kind of a model on so many devices: its name, with `-tp4` behind it for four."""
    return model if num_gpus == 1 else f"{model}-tp{num_gpus}"


@functools.cache
def _shipped_costs() -> Mapping[tuple[str, str], ModelCosts]:
    return {(row["gpu"], row["kind"]): _costs(row) for _, row in _rows(_DATA / "costs.csv")}


class _Point(NamedTuple):
    """One measured batch of equal prompts."""

    batch: int
    input_len: int
    prefill_s: float
    step_s: float


def _fit(shape: ModelShape, num_gpus: int, points: Sequence[_Point], on: GpuSpec) -> Fit:
    kv_bytes = shape.kv_bytes_per_token(num_gpus)
    slope_s = kv_bytes / on.hbm_bytes_per_s
    tokens = [p.batch * p.input_len for p in points]
    squares = [p.batch * p.input_len**2 for p in points]
    prefill_s = [p.prefill_s for p in points]
    step_s = [p.step_s for p in points]
    prefill = _least_squares([(1, *x) for x in zip(tokens, squares, strict=True)], prefill_s, prefill_s)
    flat_s = [y - slope_s * x for x, y in zip(tokens, step_s, strict=True)]
    step = _least_squares([(1, p.batch) for p in points], flat_s, step_s)
    (fixed_s, per_token_s, per_token2_s), (base_s, per_request_s) = prefill, step
    costs = ModelCosts(
        weight_bytes=shape.weight_bytes(num_gpus),
        kv_bytes_per_token=float(kv_bytes),
        prefill_s=fixed_s,
        prefill_per_token_s=per_token_s,
        prefill_per_token2_s=per_token2_s,
        step_s=base_s,
        step_per_request_s=per_request_s,
        step_per_token_s=slope_s,
        num_gpus=num_gpus,
    )
    fitted_prefill_s = [costs.prefill(*x) for x in zip(tokens, squares, strict=True)]
    fitted_step_s = [costs.step(p.batch, x) for p, x in zip(points, tokens, strict=True)]
    return Fit(costs, _quality(fitted_prefill_s, prefill_s), _quality(fitted_step_s, step_s))


def _quality(fitted: Sequence[float], measured: Sequence[float]) -> FitQuality:
    mean = statistics.fmean(measured)
    total = sum((y - mean) ** 2 for y in measured)
    rest = sum((x - y) ** 2 for x, y in zip(fitted, measured, strict=True))
    errors = [abs(x - y) / y for x, y in zip(fitted, measured, strict=True)]
    return FitQuality(1 - rest / total if total else 1.0, statistics.median(errors), len(measured))


def _least_squares(xs: Sequence[Sequence[float]], ys: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 with the least sum of ((x * k - y) / scale) ** 2."""
    rows = [[value / scale for value in (*x, y)] for x, y, scale in zip(xs, ys, scales, strict=True)]
    norms = [math.sqrt(sum(value * value for value in column)) or 1.0 for column in zip(*rows, strict=True)]
    rows = [[value / norm for value, norm in zip(row, norms, strict=True)] for row in rows]
    *sizes, size = norms
    sums = [[sum(row[i] * row[j] for row in rows) for j in range(len(norms))] for i in range(len(sizes))]
    found = non_negative([row[:-1] for row in sums], [row[-1] for row in sums])
    return [k * size / norm for k, norm in zip(found, sizes, strict=True)]


def _costs(row: Mapping[str, str]) -> ModelCosts:
    rest = {name: float(row[name]) for name in ModelCosts._fields if name not in ("weight_bytes", "num_gpus")}
    return ModelCosts(weight_bytes=int(row["weight_bytes"]), num_gpus=int(row["num_gpus"]), **rest)


def _rows(source: Traversable, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file by their lines, with at least these columns."""
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", source=str(source)) from error
    reader = csv.DictReader(lines, restval="")
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}: start with a header", key="line 1", source=str(source))
    for row in reader:
        yield reader.line_num, row


@contextmanager
def _errors_at(source: Traversable, line: int) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise error.under(f"line {line}", source=str(source)) from None
    except ValueError as error:
        raise ConfigError(f"broken row: {error}", key=f"line {line}", source=str(source)) from error
