# SPDX-License-Identifier: Apache-2.0
"""Tensors over addresses that torch did not allocate, mapped or not, through DLPack.

`torch.as_tensor` of an object with `__cuda_array_interface__` asks CUDA on which device the address lies, which fails
while nothing is mapped there, and the pool makes tensors over unmapped ranges. A DLPack capsule names its device.
"""

from __future__ import annotations

import ctypes

import torch

CPU, CUDA = 1, 2
"""kDLCPU and kDLCUDA of dlpack.h."""
_INT = 0  # kDLInt


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h with its DLTensor inlined, and the shape that it points to."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape_0", ctypes.c_int64),
    ]


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_at(address: int, nbytes: int, device_type: int, device_id: int) -> torch.Tensor:
    """An int8 tensor of shape (nbytes,) over device memory, its own storage; it keeps no memory mapped or reserved."""
    block = _libc.malloc(ctypes.sizeof(_Tensor))
    if not block:
        raise MemoryError
    # The deleter is C's `free` of this very block: no Python runs when the last tensor over the storage dies.
    here = _Tensor.from_address(block)
    here.data, here.device_type, here.device_id, here.ndim = address, device_type, device_id, 1
    here.dtype_code, here.dtype_bits, here.dtype_lanes, here.shape_0, here.deleter = _INT, 8, 1, nbytes, _FREE
    here.shape, here.strides, here.byte_offset, here.manager_ctx = block + _Tensor.shape_0.offset, None, 0, None
    return torch.from_dlpack(_new_capsule(block, b"dltensor", None))
