# SPDX-License-Identifier: Apache-2.0
"""Random lives of a host: whatever fails, hangs, aborts or comes late, each request gets its tokens or a cause."""

from __future__ import annotations

import os

import pytest

from tests.dst.scenario import LENDING
from tests.dst.seeds import differing, run_seeds

pytestmark = pytest.mark.vllm

SEEDS = range(int(os.environ.get("TOKENPOOL_DST_SEEDS", "36")))
LENDERS = range(LENDING, LENDING + len(SEEDS) * 2 // 3)
"""In these, memory is lent and models sleep."""
REGRESSIONS = (75, 80, 100, 128, 294, 405, 656, 1417)
"""Seeds that found a fault once."""


def test_every_seed_keeps_the_laws_and_two_runs_of_it_are_the_same():
    """Right tokens or an error that something injected explains, nobody waits, all books agree, nothing random."""
    seeds = sorted({*SEEDS, *REGRESSIONS})
    outcome = run_seeds(seeds)
    failures = outcome.failures | differing(seeds[:10], outcome)

    assert not failures, "\n".join(f"seed {seed}: {problem}" for seed, problem in failures.items())
    assert outcome.total("tokens_checked") > 500 * len(seeds)
    for figure in ("switches", "errors", "hosts_lost", "floors_raised"):
        assert outcome.total(figure), f"no seed has any {figure}"


def test_every_seed_keeps_the_laws_while_memory_is_lent_and_models_sleep():
    """The pool is parked, shrunk and grown beside whatever else goes wrong; no request is lost or changed by it."""
    outcome = run_seeds(LENDERS)

    assert not outcome.failures, "\n".join(f"seed {seed}: {problem}" for seed, problem in outcome.failures.items())
    for figure in ("budgets", "parked", "sleeps", "hosts_lost"):
        assert outcome.total(figure), f"no seed has any {figure}"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["hunger_is_guessed", "copies_throw_each_other_out"])
def test_a_fault_that_is_put_back_is_found(mutant):
    """The simulator is no better than the faults that it can find; bench/dst.py puts back the rarer ones too."""
    outcome = run_seeds(range(60), mutant=mutant, stop_early=True)

    assert outcome.failures


@pytest.mark.parametrize(
    "mutant", [pytest.param("lent_pages_are_counted_on", marks=pytest.mark.slow), "sleepers_are_stepped"]
)
def test_a_fault_of_lending_is_found(mutant):
    """Nor is it better where memory is lent."""
    outcome = run_seeds(LENDERS, mutant=mutant, stop_early=True)

    assert outcome.failures
