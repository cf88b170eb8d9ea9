"""Launches of clusters: programs that the GPU starts together on neighbouring processors, which write each other's shared memory.

Triton compiles for clusters only if all of them compute one tile, and Gluon has no way to ask for anything else. So a kernel is
compiled as if each program were alone, and launched as a cluster: what Triton's launcher reads before a launch is one tuple,
``(warps, programs of a cluster, shared bytes)``, which is replaced here after compiling. The launcher multiplies the grid's first
dimension by the programs of a cluster; ``program_id(0)`` then is a program's rank.

Programs of a cluster wait for one another, but never for another cluster, and the GPU starts all of a cluster or none of it: a
launch of more clusters than fit at once runs in waves and cannot hang.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..triton.device import constant
from ..triton.family import KernelCall

#: Most threads and shared memory of a program of ours; one of them has a processor for itself.
_THREADS, _SHARED_BYTES = 256, 208 * 1024
#: Numbers of the driver's attributes.
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER, _CLUSTER_DIMENSION = 8, 14, 4

_PROBE = b""".version 8.0
.target sm_90
.address_size 64
.visible .entry probe() { ret; }
"""


@dataclass(frozen=True)
class ClusterCall(KernelCall):
    """A launch whose programs of one ``program_id(1), program_id(2)`` are a cluster.

    Attributes:
        cluster: its programs; the grid's first dimension is 1.
        exchange: bytes of shared memory beyond Triton's own, for :mod:`.exchange`.
    """

    cluster: int = 1
    exchange: int = 0

    def _options(self) -> tuple[Any, ...]:
        return *super()._options(), self.cluster, self.exchange

    def _launch(self) -> Any:
        arguments = (*self.io, *self.static)
        options = {"num_warps": self.warps, "enable_fp_fusion": not self.portable, "maxnreg": self.registers}
        compiled = self.kernel.warmup(*arguments, grid=self.grid, **self.constants, **options)
        shared = -(-compiled.metadata.shared // 128) * 128 + self.exchange
        compiled.packed_metadata = (self.warps, self.cluster, shared)
        _allow_shared(compiled, shared)
        compiled[self.grid](*arguments, *self.constants.values())
        return compiled


def _allow_shared(compiled: Any, size: int) -> None:
    """Allow a kernel so much dynamic shared memory: Triton does so only where its own passes 48 KB."""
    compiled._init_handles()
    cuda = ctypes.CDLL("libcuda.so.1")
    if error := cuda.cuFuncSetAttribute(ctypes.c_void_p(compiled.function), _MAX_DYNAMIC_SHARED, size):
        raise RuntimeError(f"the GPU's driver refuses a kernel its {size} bytes of shared memory (CUresult {error})")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_uint * 6),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@constant
def refuses_clusters(size: int, index: int | None) -> str | None:
    """Why a device runs no cluster of ``size`` programs, or None if it does."""
    return None if clusters_at_once(size, index) > 0 else f"the GPU's driver has no room for clusters of {size} programs"


@cache
def clusters_at_once(size: int, index: int | None) -> int:
    """How many clusters of ``size`` programs a device runs at once, as its driver says; 0 if it does not say. Each program is
    taken to need a processor for itself, for its shared memory or its registers."""
    if not torch.cuda.is_available():
        return 0
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, module, probe = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    found = ctypes.c_int(0)
    attribute = _Attribute(id=_CLUSTER_DIMENSION)
    attribute.value[:3] = (size, 1, 1)
    config = _Config(shared=_SHARED_BYTES, attributes=ctypes.pointer(attribute), count=1)
    config.sizes[:] = (size, 1, 1, _THREADS, 1, 1)
    torch.cuda.init()  # before it, the driver says nothing
    ordinal = torch.cuda.current_device() if index is None else index
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return 0
    cuda.cuCtxPushCurrent_v2(context)
    if cuda.cuModuleLoadData(ctypes.byref(module), _PROBE) == 0:
        failed = (
            cuda.cuModuleGetFunction(ctypes.byref(probe), module, b"probe")
            or cuda.cuFuncSetAttribute(probe, _NON_PORTABLE_CLUSTER, 1)
            or cuda.cuFuncSetAttribute(probe, _MAX_DYNAMIC_SHARED, _SHARED_BYTES)
            or cuda.cuOccupancyMaxActiveClusters(ctypes.byref(found), probe, ctypes.byref(config))
        )
        if failed:
            found.value = 0
        cuda.cuModuleUnload(module)
    cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
    cuda.cuDevicePrimaryCtxRelease_v2(device)
    return found.value
