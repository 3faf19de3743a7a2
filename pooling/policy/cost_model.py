# SPDX-License-Identifier: Apache-2.0
"""What steps and copies take, predicted from what they took. Starts from a prior, learns from every step.

No offline profile is needed: a wrong prior is forgotten within some dozens of observations. Pure Python, three
coefficients at most; reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from enum import StrEnum

from tokenpool.policy.least_squares import non_negative

logger = logging.getLogger(__name__)

_MEMORY = 0.995
"""Weight of the past at each observation: the last 200 or so count."""
_PRIOR_WEIGHT = 0.3
"""Weight of the prior in observations; it never fades, or coefficients that nothing excites would drift."""
_LEAST_PIVOT = 1e-12
"""The same as a part of what was measured: far above what doubles round to, far below what a measurement says."""
_SOLVE_EVERY = 8
_CLIP = 4.0
"""An observation counts as at most so many times the usual error away from the prediction."""
_LEAST_SPREAD = 0.05
_STREAK = 8
"""So many outliers in a row on one side are a change, not outliers."""
_ERROR_MEMORY = 0.95
_TINY_S = 1e-15


class LinearFit:
    """Seconds as a linear function with coefficients of 0 or more, fitted to the recent past.

    Minimises the sum of squared errors relative to the prediction, each weighted by its age, plus the squared relative
    distance from the prior. Outliers are clipped at a multiple of the usual error; eight of them in a row on one side
    make the fit forget most of the past.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self.coefficients: tuple[float, ...] = tuple(prior)
        """Seconds per unit of each feature."""
        self.error: float | None = None
        """Mean absolute relative error of predictions made before their observation; None = nothing observed."""
        self._prior = tuple(prior)
        size = len(self._prior)
        self._gram = [[0.0] * size for _ in range(size)]
        self._moments = [0.0] * size
        self._count = 0
        self._spread = 1.0  # usual size of log(measured / predicted), wide until something is known
        self._streak = 0  # outliers in a row, below 0 for those that came in under the prediction

    def predict(self, features: Sequence[float]) -> float:
        """Seconds for these features."""
        return sum([c * x for c, x in zip(self.coefficients, features, strict=True)])

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Learn from one measurement; a negative one counts as 0, one that is not finite is left out. About 5 us."""
        predicted_s = max(self.predict(features), _TINY_S)
        if not math.isfinite(seconds) or not math.isfinite(seconds / predicted_s):
            logger.warning("measurement left out: %s s for %s, predicted %s s", seconds, tuple(features), predicted_s)
            return
        seconds = max(seconds, predicted_s / 1000)
        relative = abs(seconds - predicted_s) / seconds
        self.error = relative if self.error is None else _ERROR_MEMORY * self.error + (1 - _ERROR_MEMORY) * relative
        ratio = self._clipped(seconds / predicted_s)
        row = [x / predicted_s for x in features]
        for i, x in enumerate(row):
            gram = self._gram[i]
            for j, y in enumerate(row):
                gram[j] = gram[j] * _MEMORY + x * y
            self._moments[i] = self._moments[i] * _MEMORY + x * ratio
        self._count += 1
        if self._count <= 2 * _SOLVE_EVERY or self._count % _SOLVE_EVERY == 0:
            self._solve()

    def _clipped(self, ratio: float) -> float:
        """The ratio of measured to predicted, with outliers moved to the bound; notices a change."""
        off = math.log(ratio)
        bound = _CLIP * max(self._spread, _LEAST_SPREAD)
        if abs(off) <= bound:
            self._streak = 0
        else:
            self._streak = max(self._streak, 0) + 1 if off > 0 else min(self._streak, 0) - 1
        if abs(self._streak) >= _STREAK:
            self._streak, self._spread, self._count = 0, 1.0, 0
            # Rows are relative to the prediction of their time: bring the old ones to the size of the new.
            keep = 0.005 / max(1.0, ratio) ** 2
            self._gram = [[value * keep for value in row] for row in self._gram]
            self._moments = [value * keep for value in self._moments]
            return ratio
        off = max(-bound, min(bound, off))
        self._spread = 0.9 * self._spread + 0.1 * abs(off)
        return math.exp(off)

    def _solve(self) -> None:
        # Scaled, so that seconds per step and per token have the same size. Positive definite, by the prior's part and
        # beyond what rounding takes away.
        scales = [max(known, now, _TINY_S) for known, now in zip(self._prior, self.coefficients, strict=True)]
        gram = [
            [value * scale * other for value, other in zip(row, scales, strict=True)]
            for row, scale in zip(self._gram, scales, strict=True)
        ]
        moments = [
            moment * scale + _PRIOR_WEIGHT * known / scale
            for moment, known, scale in zip(self._moments, self._prior, scales, strict=True)
        ]
        for i in range(len(scales)):
            gram[i][i] += max(_PRIOR_WEIGHT, _LEAST_PIVOT * gram[i][i])
        self.coefficients = tuple([k * scale for k, scale in zip(non_negative(gram, moments), scales, strict=True)])


class CopyKind(StrEnum):
    """Between which memories bytes move."""

    TO_DEVICE = "to_device"
    """Weights or KV from host memory."""
    TO_HOST = "to_host"
    """KV of paused requests; weights never go this way."""
    FROM_DISK = "from_disk"
    """A checkpoint into host memory."""


class CopyModel:
    """Copies take a latency plus bytes / bandwidth, per kind. One per device, shared by its models' `CostModel`s.

    Args:
        latency_s: prior of the time that a copy takes before its first byte.
        bytes_per_s: prior of the bandwidth, for each kind or for all.
    """

    def __init__(self, latency_s: float = 1e-3, bytes_per_s: float | dict[CopyKind, float] = 10e9) -> None:
        by_kind = bytes_per_s if isinstance(bytes_per_s, dict) else dict.fromkeys(CopyKind, bytes_per_s)
        self._fits = {kind: LinearFit((latency_s, 1 / by_kind.get(kind, 10e9))) for kind in CopyKind}

    def observe(self, kind: CopyKind, nbytes: int, seconds: float) -> None:
        """Learn from a copy; one of no bytes is ignored."""
        if nbytes > 0:
            self._fits[kind].observe((1.0, float(nbytes)), seconds)

    def predict(self, kind: CopyKind, nbytes: int) -> float:
        """Seconds for a copy of `nbytes`; 0 for none."""
        return self._fits[kind].predict((1.0, float(nbytes))) if nbytes > 0 else 0.0

    def coefficients(self) -> dict[str, tuple[float, float]]:
        """Latency in seconds and bytes per second, by kind."""
        fits = {kind.value: fit.coefficients for kind, fit in self._fits.items()}
        return {kind: (latency_s, 1 / max(per_byte_s, 1e-15)) for kind, (latency_s, per_byte_s) in fits.items()}

    def errors(self) -> dict[str, float]:
        """Mean absolute relative error by kind, of the kinds observed."""
        return {kind.value: fit.error for kind, fit in self._fits.items() if fit.error is not None}


class CostModel:
    """Seconds of one model's steps and of its device's copies.

        decode step     a + b * requests + c * context tokens
        prefill step    d + e * prompt tokens
        mixed step      decode step + e * prompt tokens

    Args:
        step_s: prior of a, the step of an empty batch: about weight bytes / memory bandwidth.
        step_per_request_s: prior of b.
        step_per_token_s: prior of c, per token of context that attention reads.
        prefill_s: prior of d.
        prefill_per_token_s: prior of e.
        copies: the device's copies; None = a model of its own.
    """

    def __init__(
        self,
        *,
        step_s: float = 0.01,
        step_per_request_s: float = 1e-4,
        step_per_token_s: float = 1e-8,
        prefill_s: float = 0.01,
        prefill_per_token_s: float = 3e-5,
        copies: CopyModel | None = None,
    ) -> None:
        self.copies = copies or CopyModel()
        """The device's copies."""
        self._decode = LinearFit((step_s, step_per_request_s, step_per_token_s))
        self._prefill = LinearFit((prefill_s, prefill_per_token_s))

    def observe_step(self, num_decodes: int, context_tokens: int, prefill_tokens: int, seconds: float) -> None:
        """Learn from one step: requests that decoded, tokens of context they read, prompt tokens, and its time."""
        if num_decodes > 0 and prefill_tokens > 0:
            rest_s = seconds - self._decode.predict((1.0, num_decodes, context_tokens))
            # Less than the decode alone says nothing about prompts.
            if rest_s > 0 or not math.isfinite(rest_s):
                self._prefill.observe((0.0, prefill_tokens), rest_s)
        elif num_decodes > 0:
            self._decode.observe((1.0, num_decodes, context_tokens), seconds)
        elif prefill_tokens > 0:
            self._prefill.observe((1.0, prefill_tokens), seconds)

    def predict_step(self, num_decodes: int, context_tokens: int, prefill_tokens: int = 0) -> float:
        """Seconds of a step; never negative, never less for more tokens of the same kind. 0 for an empty step."""
        if num_decodes <= 0:
            return self.predict_prefill(prefill_tokens)
        prompt_s = self._prefill.coefficients[1] * prefill_tokens
        return self._decode.predict((1.0, num_decodes, context_tokens)) + prompt_s

    def predict_prefill(self, num_tokens: int) -> float:
        """Seconds to prefill `num_tokens` in one step; 0 for none."""
        return self._prefill.predict((1.0, num_tokens)) if num_tokens > 0 else 0.0

    def coefficients(self) -> dict[str, float]:
        """The letters of the formulas above, in seconds, by the names of the priors."""
        values = (*self._decode.coefficients, *self._prefill.coefficients)
        names = ("step_s", "step_per_request_s", "step_per_token_s", "prefill_s", "prefill_per_token_s")
        return dict(zip(names, values, strict=True))

    def observe_copy(self, kind: CopyKind, nbytes: int, seconds: float) -> None:
        """Learn from a copy on the device."""
        self.copies.observe(kind, nbytes, seconds)

    def predict_copy(self, kind: CopyKind, nbytes: int) -> float:
        """Seconds for a copy of `nbytes`; 0 for none."""
        return self.copies.predict(kind, nbytes)

    def errors(self) -> dict[str, float]:
        """Mean absolute relative error of recent predictions by kind: decode, prefill, and the copies observed."""
        fits = {"decode": self._decode, "prefill": self._prefill}
        return {name: fit.error for name, fit in fits.items() if fit.error is not None} | self.copies.errors()
