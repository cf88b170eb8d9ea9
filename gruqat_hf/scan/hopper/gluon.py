"""Gluon, Triton's language of explicit layouts, as these kernels use it; what changed from 3.6 to 3.9 is known here alone."""

from __future__ import annotations

from triton.experimental.gluon import constexpr_function, jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

__all__ = ["commit_copies", "constexpr_function", "copy_to_shared", "gl", "jit", "mma_v2", "wait_for_copies"]

#: ``copy_to_shared(destination, pointers, mask)``: cp.async; elements outside the mask become zero. Renamed in 3.8.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
commit_copies = async_copy.commit_group
#: ``wait_for_copies(n)``: until at most n groups are under way. The compiler puts a barrier behind it, where every thread sees
#: the copies and earlier stores of the others.
wait_for_copies = async_copy.wait_group
