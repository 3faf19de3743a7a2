# SPDX-License-Identifier: Apache-2.0
"""The devices that a simulation can be made of, with the few numbers its costs and memory follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenpool.errors import ConfigError, show

_RESERVE_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of device: what it holds and how fast it is at best."""

    name: str
    """Key in `GPUS`; the part before the hyphen is the name of the chip, as profiles give it."""
    memory_bytes: int
    """All memory that the driver reports, so without what error correction takes."""
    hbm_bytes_per_s: float
    """Peak bandwidth of the device memory."""
    bf16_flops_per_s: float
    """Peak of dense bf16 matrix products, in floating point operations per second; a multiply-add is two."""
    usable_frac: float = 0.9
    """Share of the memory that one process plans with. The rest is for the CUDA context and what else runs beside
    it; 0.9 is the customary default of vLLM's gpu_memory_utilization."""

    @property
    def chip(self) -> str:
        """The name without the memory size: `h100` of `h100-80g`."""
        return self.name.partition("-")[0]

    @property
    def pool_bytes(self) -> int:
        """Memory for weights and KV of all models: usable_frac of the device, less 4 GB.

        The reserve is an assumption: activations of a prefill of 8,192 tokens and CUDA graphs of the largest
        model, held once, since models of a pool take turns.
        """
        return max(0, int(self.memory_bytes * self.usable_frac) - _RESERVE_BYTES)


def _spec(name: str, memory_mib: int, hbm_gb_per_s: float, bf16_tflops: float) -> GpuSpec:
    return GpuSpec(name, memory_mib << 20, hbm_gb_per_s * 1e9, bf16_tflops * 1e12)


GPUS: Mapping[str, GpuSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _spec("a10-24g", 23_028, 600, 125),
            _spec("a100-40g", 40_960, 1_555, 312),
            _spec("a100-80g", 81_920, 2_039, 312),
            _spec("h100-80g", 81_559, 3_350, 989),
            _spec("h20-96g", 97_871, 4_000, 148),
            _spec("h200-141g", 143_771, 4_800, 989),
            _spec("h800-80g", 81_559, 3_350, 989),
            _spec("l40s-48g", 46_068, 864, 362),
        )
    }
)
"""By name; A100, H100, H800, H20 and H200 are the SXM variants.

Source: bandwidth and FLOPs from NVIDIA's data sheets, those without sparsity; memory as nvidia-smi lists it.
"""


def gpu(name: str) -> GpuSpec:
    """Return a device of the catalogue; raises ConfigError that names the known ones."""
    spec = GPUS.get(name)
    if spec is None:
        raise ConfigError(f"no such GPU: {show(name)}; known are {', '.join(GPUS)}", key="gpu")
    return spec
