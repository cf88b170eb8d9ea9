"""The compiled kernels as Python calls them."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arithmetic import portable_sigmoid, portable_tanh
from .build import BuildError, built_library

logger = logging.getLogger("gruqat_hf")

_VERSION = 1

#: Features are padded to a multiple of this, as TILE in vectors.h.
TILE = 16

BLOCKS, DIAGONAL, MONARCH = range(3)


class GridStruct(Structure):
    _fields_ = [(name, c_float) for name in ("scale", "inverse", "low", "high")]


class FactorStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weights", "offsets", "scales")),
        *((name, c_int32) for name in ("integer", "sets", "columns", "blocks", "tiles", "groups", "steps", "in_", "out")),
        ("grid", GridStruct * 3),
    ]


class OperandStruct(Structure):
    _fields_ = [("kind", c_int32), ("in_", c_int32), ("out", c_int32), ("first", FactorStruct), ("second", FactorStruct)]


class LayerStruct(Structure):
    _fields_ = [
        ("hidden", c_int32),
        ("padded", c_int32),
        ("input", OperandStruct),
        ("recurrent", OperandStruct),
        *((name, c_void_p) for name in ("bias_input", "bias_hidden", "state_grid", "gates_grid")),
    ]


class CallStruct(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_step", c_int64),
        ("x_row", c_int64),
        ("gi", c_void_p),
        ("h0", c_void_p),
        ("mask", c_void_p),
        ("mask_step", c_int64),
        ("mask_row", c_int64),
        ("out", c_void_p),
        ("last", c_void_p),
        ("gates", c_void_p),
        ("steps", c_int64),
        ("batch", c_int64),
        ("reverse", c_int32),
        ("threads", c_int32),
    ]


class AdjointStruct(Structure):
    _fields_ = [("transposed", OperandStruct)]


class BackwardStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("h0", "states", "gates", "dstates", "dlast", "mask")),
        ("mask_step", c_int64),
        ("mask_row", c_int64),
        *((name, c_void_p) for name in ("dgi", "dgh_n", "dh0", "adjoint")),
        ("steps", c_int64),
        ("batch", c_int64),
        ("reverse", c_int32),
        ("threads", c_int32),
    ]


class Library:
    """The kernels of one build.

    Attributes:
        level: instruction set.
        pack: how many neighbours along the input an integer step takes.
        weight_dtype: of packed integer weights.
        infer: ``gruqat_infer(LayerStruct*, CallStruct*)``; other Python threads run meanwhile.
        backward: ``gruqat_backward(LayerStruct*, AdjointStruct*, BackwardStruct*)``.

    Raises:
        BuildError: the file is no build of this source, or computes other gates.
    """

    def __init__(self, path: Path, level: str) -> None:
        self.level = level
        try:
            self._handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        layout = (c_int32 * 6)()
        self._handle.gruqat_layout(layout)
        sizes = [ctypes.sizeof(struct) for struct in (LayerStruct, CallStruct, AdjointStruct, BackwardStruct)]
        if self._handle.gruqat_version() != _VERSION or layout[2:] != sizes:
            raise BuildError(f"{path} is not a build of this version's kernels")
        self.pack = layout[0]
        self.weight_dtype = {1: torch.int8, 2: torch.int16}[layout[1]]
        self._check_gates(path)
        self.infer = self._handle.gruqat_infer
        self.infer.argtypes, self.infer.restype = (POINTER(LayerStruct), POINTER(CallStruct)), None
        self.backward = self._handle.gruqat_backward
        self.backward.argtypes = (POINTER(LayerStruct), POINTER(AdjointStruct), POINTER(BackwardStruct))
        self.backward.restype = None
        self.is_parallel = self._use_team()

    def _check_gates(self, path: Path) -> None:
        """A compiler that fuses or reorders would break the promise of equal bits; a few values tell."""
        x = torch.linspace(-16.0, 16.0, 1 << 12, dtype=torch.float32, device="cpu")
        for sigmoid, gate in enumerate((portable_tanh, portable_sigmoid)):
            y = torch.empty_like(x)
            self._handle.gruqat_gate(sigmoid, c_void_p(x.data_ptr()), c_void_p(y.data_ptr()), c_int64(x.numel()))
            if not torch.equal(y, gate(x)):
                raise BuildError(f"{path}: this compiler does not keep the order of floating-point operations")

    def _use_team(self) -> bool:
        """Run on the threads that torch runs on, where it runs on OpenMP."""
        bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
        for name in (*bundled, None):
            try:
                openmp = ctypes.CDLL(None if name is None else str(name))
                functions = (openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads)
            except (OSError, AttributeError, TypeError):
                continue
            self._handle.gruqat_use_team(*(ctypes.cast(function, c_void_p) for function in functions))
            return True
        return False


_lock = threading.Lock()
_loaded: Library | str | None = None

#: A forked child's OpenMP has the parent's threads on its books, but not in the process: it would wait for them for ever.
_is_forked = False


def _after_fork() -> None:
    global _is_forked, _lock
    _is_forked = True
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had this module loaded."""
    return _is_forked


@contextmanager
def on_usable_threads() -> Iterator[None]:
    """In a forked child, torch's own operators run on one thread meanwhile."""
    if not _is_forked or torch.get_num_threads() == 1:
        yield
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def threads() -> int:
    """How many threads a call may use."""
    return 1 if _is_forked else torch.get_num_threads()


def library() -> Library | str:
    """The kernels, built or loaded at the first call, or why there are none; that is logged once."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                try:
                    # An exporter makes this thread's tensors ones without data; another thread's can be checked with.
                    with ThreadPoolExecutor(1) as apart:
                        _loaded = apart.submit(lambda: Library(*built_library())).result()
                    logger.info("CPU kernels: %s", _loaded.level)
                except BuildError as error:
                    _loaded = str(error)
                    logger.warning("no CPU kernels, the reference runs instead: %s", error)
    return _loaded


def pointer(tensor: Tensor | None) -> Any:
    """Address of a tensor's data for a struct's field; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()
