# SPDX-License-Identifier: Apache-2.0
"""Patches that mend vLLM: what is a request's own stays its own in a batch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tokenpool.patches import PATCHES, apply_all

pytestmark = pytest.mark.vllm


@pytest.fixture
def patched() -> Iterator[None]:
    was_applied = bool(PATCHES._originals)
    apply_all()
    yield
    if not was_applied:
        PATCHES.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_each_draft_has_the_value_of_its_request(patched, dtype):
    """Requests have 2, 0, 3 and 1 drafts; one value stands for another, as temperature 0 does for 1."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values, ends = torch.tensor([5, 7, 0, 9], dtype=dtype), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    expanded = expand_batch_to_tokens(values, ends, 6, replace_from=0, replace_to=1)

    assert expanded.dtype is dtype
    assert [5, 5, 1, 1, 1, 9] == expanded.tolist()
    assert [5, 7, 0, 9] == values.tolist()


def test_audio_is_encoded_in_the_order_of_the_batch(patched):
    """Also when a row that a finished request has left is before that of a request which was scheduled earlier."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    names, seen = list("abcdef"), []
    for seed, is_encoder_decoder in ((1, True), (2, True), (3, False)):
        rows = names.copy()
        random.Random(seed).shuffle(rows)
        scheduled = SchedulerOutput.make_empty()
        scheduled.scheduled_encoder_inputs = {name: [0] for name in names[:4]}
        runner = SimpleNamespace(
            model_config=SimpleNamespace(is_encoder_decoder=is_encoder_decoder),
            input_batch=SimpleNamespace(req_id_to_index={name: row for row, name in enumerate(rows)}),
            _batch_mm_inputs_from_scheduler=lambda output: (seen.append([*output.scheduled_encoder_inputs]), [], []),
        )
        assert [] == GPUModelRunner._execute_mm_encoder(runner, scheduled)
        want = [name for name in rows if name in names[:4]] if is_encoder_decoder else names[:4]
        assert want == seen[-1] and names[:4] == [*scheduled.scheduled_encoder_inputs]
    assert seen[0] != names[:4]


REGISTER = """
import numba
from tokenpool.patches import apply_all
apply_all()
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher
from vllm.v1.worker.block_table import ComputeSlotMappingKernel
register, calls = dispatcher._rebind_kernels, []
def once_broken(overrides):
    calls.append(len(overrides))
    if len(calls) == 1:
        raise OSError("broken")
    register(overrides)
dispatcher._rebind_kernels = once_broken
for _ in range(3):
    try:
        current_platform.register_triton_kernel_overrides()
    except OSError:
        assert not dispatcher._registry, "a model that is tried again would run without its kernels"
assert len(calls) == 2, calls
assert type(ComputeSlotMappingKernel.kernel) is dispatcher.KernelOverride
"""


def test_kernels_are_registered_once_also_behind_numba():
    """A first model with n-grams imports numba before; what failed is done anew, what is done is not."""
    pytest.importorskip("vllm.triton_utils.dispatcher")
    made = subprocess.run([sys.executable, "-c", REGISTER], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
