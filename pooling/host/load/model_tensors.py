# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a vLLM model can leave the device with its weights, and what stays there for good.

Movable are parameters and buffers, and whatever else in the model views the same storages. Fixed are the tensors that
change while the model runs, such as LoRA stacks and attention scales, and those that vLLM keeps in plain attributes,
containers or closures; also those of a layer with a handle of oneDNN, and the weights that the handle has packed: it
keeps raw pointers to the layer's scales. KV caches are neither: they belong to the arena. What other C++ code keeps to
itself is not seen; adoption_check.py finds it out.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm._custom_ops import CPUDNNLGEMMHandler

_CHANGING = frozenset(
    {
        "_q_scale",  # filled on the first step when --calculate-kv-scales is set
        "_k_scale",
        "_v_scale",
        "_prob_scale",
        "_expert_map",  # rewritten when experts are rearranged
        "expert_mask",
        "expert_global_to_physical",
        "expert_physical_to_global",
        "expert_local_to_global",
    }
)
"""Buffers that may change at run time, by the name a module has them under."""

_KV_CACHES = frozenset({"kv_cache"})
"""Attributes that hold views of the KV arena."""

_OPAQUE = ("vllm.config", "vllm.distributed", "transformers.", "torch.", "torch_")
"""Modules whose objects are not searched: they lead to the whole process. Modules and tensors are, whatever theirs."""

_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType)


def models_of(model_runner: Any) -> list[torch.nn.Module]:
    """The model of a runner, of vLLM's first or second, and its draft model if it has one."""
    models = (model_runner.get_model(), model_runner.get_draft_model())
    return [model for model in models if model is not None]


def movable_tensors(*models: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, in the order of the modules, then other tensors that view their storages.

    A storage that holds a changing tensor is left out whole, and so are those of a layer with a handle. Meta tensors
    and those without bytes are left out.
    """
    found: dict[int, torch.Tensor] = {}
    changing: set[int] = set()
    for layer in (owner for _, owner, value in _walk(models) if isinstance(value, CPUDNNLGEMMHandler)):
        own = (*layer._parameters.values(), *layer._buffers.values())
        changing |= {_storage(tensor) for tensor in own if tensor is not None and _has_bytes(tensor)}
    for module in _modules(models):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not _has_bytes(tensor):
                continue
            if name in _CHANGING:
                changing.add(_storage(tensor))
            found[id(tensor)] = tensor
    storages = {_storage(tensor) for tensor in found.values()} - changing
    for _, tensor in reachable_tensors(*models):
        found.setdefault(id(tensor), tensor)
    return [tensor for tensor in found.values() if _storage(tensor) in storages]


def fixed_tensors(*models: torch.nn.Module) -> dict[str, int]:
    """Path of the first tensor that views it -> bytes, for each storage that stays on the device, and each handle."""
    movable = {_storage(tensor) for tensor in movable_tensors(*models)}
    fixed: dict[int, tuple[str, int]] = {}
    for path, _, value in _walk(models):
        if isinstance(value, CPUDNNLGEMMHandler):
            fixed[id(value)] = (path, _packed_bytes(path, value))
        elif _storage(value) not in movable:
            fixed.setdefault(_storage(value), (path, value.untyped_storage().nbytes()))
    return dict(fixed.values())


def fixed_bytes(*models: torch.nn.Module) -> int:
    """Bytes of the model that stay on the device when its weights leave it; KV and what is not seen not counted."""
    return sum(fixed_tensors(*models).values())


def weight_bytes_of(*models: torch.nn.Module) -> int:
    """Bytes of the distinct storages behind the parameters and buffers of models, which may share some."""
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def reachable_tensors(*roots: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor with bytes that can be reached from `roots`, once, with the path that leads to it.

    Follows attributes, containers, closures, bound methods and partial functions; not configs, process groups and
    objects of torch other than modules and tensors.
    """
    return ((path, value) for path, _, value in _walk(roots) if isinstance(value, torch.Tensor))


def _walk(roots: Iterable[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Path, module that leads to it (None without) and value of every tensor and handle below `roots`, each once."""
    queue: deque[tuple[str, Any, Any]] = deque((type(root).__name__, None, root) for root in roots)
    seen: dict[int, Any] = {}  # values keep the objects alive, so that no id is used twice
    while queue:
        path, owner, value = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, torch.nn.Module):
            owner = value
        elif isinstance(value, torch.Tensor):
            if _has_bytes(value):
                yield path, owner, value
        elif isinstance(value, CPUDNNLGEMMHandler):
            yield path, owner, value
        elif type(value).__module__.startswith(_OPAQUE):
            continue
        queue.extend((f"{path}{step}", owner, child) for step, child in _children(value))


def _packed_bytes(path: str, handle: CPUDNNLGEMMHandler) -> int:
    """Bytes of the weights that a handle has packed, what it pads not counted; of int8 where a scaled kernel has it."""
    return handle.n * handle.k * (1 if path.endswith(".dnnl_handler") else 2)


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [("()", item) for item in (*cells, *(value.__defaults__ or ()), value.__kwdefaults__)]
    if isinstance(value, types.MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, types.BuiltinFunctionType):
        return [("", value.__self__)]
    if isinstance(value, functools.partial):
        return [("()", item) for item in (value.func, value.args, value.keywords)]
    slots = [name for kind in type(value).__mro__ for name in _slots_of(kind) if hasattr(value, name)]
    named = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
    if isinstance(value, torch.nn.Module):
        own = [named.pop(name, {}) for name in ("_parameters", "_buffers", "_modules")]
        named.update({name: item for group in own for name, item in group.items()})
    return [(f".{name}", item) for name, item in named.items() if name not in _KV_CACHES]


def _slots_of(kind: type) -> list[str]:
    if kind.__module__.startswith(("builtins", "torch", "_")):
        return []  # a slot of theirs may be a property that computes
    slots = kind.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _modules(models: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    seen: set[int] = set()
    for model in models:
        for module in model.modules():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _has_bytes(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
