# SPDX-License-Identifier: Apache-2.0
"""Defaults of flags for engines that share a GPU: what each of them takes of it, whatever it does, is paid many times.

vLLM's defaults on a large GPU are 1024 sequences, for which its sampler keeps a count of each token of the vocabulary
(0.5 to 1 GB), and 51 sizes of CUDA graphs. Not yet measured on hardware.
"""

from __future__ import annotations

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

NUM_SEQUENCES = 256


def keep_engine_small(args: EngineArgs) -> None:
    """Fill in the sequences at once and the sizes of graphs where the user gave none; nothing but on CUDA."""
    if not current_platform.is_cuda():
        return
    if args.max_num_seqs is None:
        args.max_num_seqs = NUM_SEQUENCES
    config = args.compilation_config
    asked = (
        args.cudagraph_capture_sizes,
        args.max_cudagraph_capture_size,
        config.cudagraph_capture_sizes,
        config.max_cudagraph_capture_size,
    )
    # With drafts a sequence has several tokens in each step: vLLM knows the sizes for them.
    if not args.enforce_eager and args.speculative_config is None and all(each is None for each in asked):
        args.cudagraph_capture_sizes = capture_sizes(args.max_num_seqs)


def capture_sizes(num_sequences: int) -> list[int]:
    """1, 2, 4, ... up to the number of sequences, which is one of them: a batch is padded to at most twice its size."""
    sizes = [1 << power for power in range(num_sequences.bit_length()) if 1 << power < num_sequences]
    return [*sizes, num_sequences]
