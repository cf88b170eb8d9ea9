"""Shared memory of a program: steps on their way from global memory, and what its own warps tell one another.

Of a step on its way, a thread copies just what it reads itself: the two channels of a row that are its own. So no thread waits
for another, a step costs no barrier, and registers hold none of the steps that are to come. Within a step, a plane has one value
for each channel and row.

The memory is declared in PTX for the reason that :mod:`..exchange` gives.
"""

from __future__ import annotations

from ..gluon import constexpr_function, gl, jit


@constexpr_function
def pair_bytes(DTYPE):
    """Bytes of a thread's two channels."""
    return DTYPE.primitive_bitwidth // 4


@constexpr_function
def plane_bytes(DTYPE, BLOCK, ROWS):
    """Bytes of a plane."""
    return BLOCK * ROWS * DTYPE.primitive_bitwidth // 8


@constexpr_function
def _copy_text(BYTES, COUNT, STRIDE, PLANE):
    kind = "cg" if BYTES == 16 else "ca"
    copies = [f"cp.async.{kind}.shared.global [$2+{i * PLANE}], [$4+{i * STRIDE}], {BYTES}, $6;\n" for i in range(COUNT)]
    return "".join(copies) + "mov.u32 $0, 0; mov.u32 $1, 0;"


@constexpr_function
def _chunks_text(COUNT, STRIDE):
    text = ""
    for i in range(COUNT):
        words = ", ".join(f"${4 * i + word}" for word in range(4))
        text += f"ld.shared.v4.b32 {{{words}}}, [${4 * COUNT}+{i * STRIDE}];\n"
    return text


@constexpr_function
def _chunks_registers(COUNT):
    return ",".join(["=&r"] * (4 * COUNT) + ["r"] * (8 * COUNT))


@constexpr_function
def _declaration(BYTES):
    return f".shared .align 128 .b8 gruqat_memory[{BYTES}]; mov.u32 $0, gruqat_memory;"


@constexpr_function
def _wait_text(COUNT):
    return f"cp.async.wait_group {COUNT};"


@jit
def _run(TEXT: gl.constexpr):
    gl.inline_asm_elementwise(TEXT + " mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def open_memory(BYTES: gl.constexpr):
    """Declare the memory. Gives its address, which places in it are added to."""
    TEXT: gl.constexpr = _declaration(BYTES)
    return gl.inline_asm_elementwise(TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def copy_pairs(at, pointer, valid, COUNT: gl.constexpr = 1, STRIDE: gl.constexpr = 0, PLANE: gl.constexpr = 0):
    """Set out for each two values of a thread that lie at ``pointer``, to the place ``at``; zeros where not ``valid``.

    Likewise for COUNT - 1 more, each STRIDE values further on, to places PLANE bytes apart.
    """
    BYTES: gl.constexpr = pair_bytes(pointer.dtype.element_ty)
    TEXT: gl.constexpr = _copy_text(BYTES, COUNT, STRIDE * BYTES // 2, PLANE)
    size = gl.where(valid, BYTES, 0)
    gl.inline_asm_elementwise(
        TEXT, "=&r,=&r,r,r,l,l,r,r", [at, pointer.to(gl.int64), size], dtype=gl.int32, is_pure=False, pack=2
    )


@jit
def commit_step():
    """All copies since the last time are one step's."""
    TEXT: gl.constexpr = "cp.async.commit_group;"
    _run(TEXT)


@jit
def wait_for_step(COUNT: gl.constexpr):
    """Until at most COUNT steps of this thread are on their way."""
    TEXT: gl.constexpr = _wait_text(COUNT)
    _run(TEXT)


@jit
def take_pairs(at, DTYPE: gl.constexpr):
    """The values of DTYPE that :func:`copy_pairs` brought to ``at``, in its layout."""
    if DTYPE.primitive_bitwidth == 16:
        TEXT: gl.constexpr = "ld.shared.b32 $0, [$1];"
        bits = gl.inline_asm_elementwise(TEXT, "=r,r,r", [at], dtype=gl.int16, is_pure=False, pack=2)
    elif DTYPE.primitive_bitwidth == 32:
        TEXT: gl.constexpr = "ld.shared.v2.b32 {$0, $1}, [$2];"
        bits = gl.inline_asm_elementwise(TEXT, "=r,=r,r,r", [at], dtype=gl.int32, is_pure=False, pack=2)
    else:
        TEXT: gl.constexpr = "ld.shared.v2.b64 {$0, $1}, [$2];"
        bits = gl.inline_asm_elementwise(TEXT, "=l,=l,r,r", [at], dtype=gl.int64, is_pure=False, pack=2)
    return bits.to(DTYPE, bitcast=True)


@jit
def put_pairs(at, values):
    """Write each two fp16 values of a thread to the first's place ``at``."""
    TEXT: gl.constexpr = "st.shared.b32 [$3], $2; mov.u32 $0, 0; mov.u32 $1, 0;"
    gl.inline_asm_elementwise(TEXT, "=&r,=&r,r,r,r", [values, at], dtype=gl.int32, is_pure=False, pack=2)


@jit
def take_chunks(at, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """fp16 values in the layout of ``at``: a thread's are COUNT chunks of 16 bytes, STRIDE apart from its first ``at`` on."""
    TEXT: gl.constexpr = _chunks_text(COUNT, STRIDE)
    REGISTERS: gl.constexpr = _chunks_registers(COUNT)
    return gl.inline_asm_elementwise(TEXT, REGISTERS, [at], dtype=gl.float16, is_pure=False, pack=8 * COUNT)


@jit
def meet():
    """Until all warps of a program have come here; each then sees what the others have written."""
    TEXT: gl.constexpr = "bar.sync 0;"
    _run(TEXT)


@jit
def in_order():
    """What is stored after this line is not stored before what was sent above it, which others wait for."""
    TEXT: gl.constexpr = "bar.warp.sync 0xffffffff;"
    _run(TEXT)
