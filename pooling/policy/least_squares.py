# SPDX-License-Identifier: Apache-2.0
"""Least squares with coefficients of 0 or more, for the few unknowns of a cost formula. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_NEARLY_0 = 1e-12


def non_negative(gram: Sequence[Sequence[float]], moments: Sequence[float]) -> list[float]:
    """The coefficients k of at least 0 with the least k·gram·k - 2 k·moments; all 0 where nothing else is less.

    For rows x and values y, `gram` holds the sums of x[i] * x[j] and `moments` those of x[i] * y. Scale both so that
    the diagonal of `gram` is about 1 or more: what is far below 1 after elimination counts as 0, and then one of the
    coefficients that are told apart by it stays 0.

    The answer is the best of the solutions with some coefficients 0 and no other below 0. All are tried, the one
    without a 0 first, which is usually the answer: O(2 ** unknowns) at worst.
    """
    size = len(moments)
    best, most = [0.0] * size, 0.0
    for count in range(size, 0, -1):
        for used in itertools.combinations(range(size), count):
            solved = _solve([[*(gram[i][j] for j in used), moments[i]] for i in used])
            if solved is None or min(solved) < 0:
                continue
            if count == size:
                return solved
            won = sum([moments[i] * k for i, k in zip(used, solved, strict=True)])
            if won > most:
                best, most = [0.0] * size, won
                for i, k in zip(used, solved, strict=True):
                    best[i] = k
    return best


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """Solution of equations whose last column is the right side; None if they do not have exactly one."""
    size = len(matrix)
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(matrix[row][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < _NEARLY_0:
            return None
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for row in range(size):
            if row != i:
                factor = matrix[row][i]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[i], strict=True)]
    return [row[-1] for row in matrix]
