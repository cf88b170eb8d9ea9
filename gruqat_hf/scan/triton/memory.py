"""Accesses to global memory that ``tl.load`` and ``tl.store`` would make otherwise than they must be."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import PTX


@triton.jit
def put(pointer, value, mask):
    """Store from the layout that a value is in; ``tl.store`` would first bring it into another, through shared memory."""
    if PTX and value.dtype == tl.float32:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.f32 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,f,r",
            [pointer.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    elif PTX and value.dtype == tl.int64:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l,r",
            [pointer.to(tl.int64), value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def fetch(pointer, mask):
    """fp32 values that other programs have written meanwhile, 0 where masked.

    ``tl.load`` in a pipelined loop becomes an asynchronous copy, which for less than 16 bytes goes through the processor's own
    cache whatever it was told, and may find there what was written before.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.gpu.global.f32 $0, [$1]; }",
            "=f,l,r",
            [pointer.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.load(pointer, mask=mask, other=0.0)
