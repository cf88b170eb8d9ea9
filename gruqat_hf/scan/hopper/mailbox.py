"""Values that programs of a grid hand each other through the cache they share; each word says itself whether it is there.

A mailbox lies in global memory and begins as SILENCE in every word. A program posts words, each once, and whoever wants them
reads until none of them is SILENCE any more. The words are all of the message: nothing has to be ordered before or after them,
so that there are neither fences nor flags, and a step waits for one way to the cache and one way back. SILENCE itself is never
posted: conversions to fp16 give no NaN but 0x7fff, and magnitudes have no sign.

All programs want the same words at about the same time, and whoever looks for them in vain keeps them from others: it pays to
look a little later, which is what ``patience`` is for.

Whoever waits for others needs them on the GPU at once: kernels that use this are launched cooperatively, with no more programs
than there are processors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gluon import constexpr_function, gl, jit

#: All ones: two fp16 NaNs, or an fp32 one, that no instruction gives; and the largest integer, which :func:`_hear_text` needs.
SILENCE = -1


def new_mailbox(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Room for int32 words that are posted once; every launch needs its own."""
    return torch.full(shape, SILENCE, dtype=torch.int32, device=device)


@constexpr_function
def _hear_text(COUNT, STRIDE, TENSORS, DISTANCE):
    chunks = [tensor * DISTANCE + i * STRIDE for tensor in range(TENSORS) for i in range(COUNT)]
    words = [[f"${4 * i + word}" for word in range(4)] for i in range(len(chunks))]
    at, patience = f"${4 * len(chunks)}", f"${4 * len(chunks) + 8 * COUNT}"
    look = [f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(word)}}}, [{at}+{place}];\n" for word, place in zip(words, chunks)]
    text = f"{{ .reg .pred any, silent<{len(chunks)}>; .reg .b32 one, other, began, now; mov.u32 began, %clock;\n"
    text += f"early: mov.u32 now, %clock; sub.u32 now, now, began; setp.lt.u32 any, now, {patience};\n@any bra early;\n"
    text += "".join(look) + "again: setp.ne.u32 any, 0, 0;\n"
    for i, word in enumerate(words):
        text += f"max.u32 one, {word[0]}, {word[1]}; max.u32 other, {word[2]}, {word[3]}; max.u32 one, one, other;\n"
        text += f"setp.eq.u32 silent{i}, one, {SILENCE}; or.pred any, any, silent{i};\n"
    text += "@!any bra heard;\n" + "".join(f"@silent{i} {load}" for i, load in enumerate(look))
    return text + "bra again;\nheard: }"


@constexpr_function
def _hear_one_text():
    return f"""{{ .reg .pred silent; .reg .b32 word;
        again: ld.relaxed.gpu.global.b32 word, [$1];
        setp.eq.u32 silent, word, {SILENCE};
        @silent bra again;
        mov.b32 $0, word; }}"""


@constexpr_function
def _hear_registers(COUNT, TENSORS):
    """Words that are written before all is read; an address and a number for each value of a tensor."""
    return ",".join(["=&r"] * (4 * COUNT * TENSORS) + ["l"] * (8 * COUNT) + ["r"] * (8 * COUNT))


@jit
def _as_many(number, at):
    """A number for each of ``at``, in its layout, as the instructions want it."""
    return gl.full(at.shape, 0, gl.int32, layout=at.type.layout) + number


@jit
def hear_chunks(at, patience, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """fp16 values in the layout of ``at``, when all of a thread's are there: COUNT chunks of 16 bytes, STRIDE bytes apart from
    its first address ``at`` on. Looked for ``patience`` cycles from now, and then again and again."""
    return gl.inline_asm_elementwise(
        _hear_text(COUNT, STRIDE, 1, 0), _hear_registers(COUNT, 1), [at, _as_many(patience, at)],
        dtype=gl.float16, is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@jit
def hear_three(at, patience, COUNT: gl.constexpr, STRIDE: gl.constexpr, DISTANCE: gl.constexpr):
    """Three such tensors, DISTANCE bytes apart, looked for together."""
    return gl.inline_asm_elementwise(
        _hear_text(COUNT, STRIDE, 3, DISTANCE), _hear_registers(COUNT, 3), [at, _as_many(patience, at)],
        dtype=(gl.float16, gl.float16, gl.float16), is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@jit
def post_pairs(at, value):
    """Post fp32 values of two neighbouring lanes as a word of fp16, at the address of the even one."""
    TEXT: gl.constexpr = """{ .reg .b32 other, word, lane; .reg .pred even;
        shfl.sync.bfly.b32 other, $2, 1, 0x1f, 0xffffffff;
        cvt.rn.f16x2.f32 word, other, $2;
        mov.u32 lane, %laneid; and.b32 lane, lane, 1; setp.eq.u32 even, lane, 0;
        @even st.relaxed.gpu.global.b32 [$1], word;
        mov.u32 $0, 0; }"""
    gl.inline_asm_elementwise(TEXT, "=r,l,f", [at, value], dtype=gl.int32, is_pure=False, pack=1)


@jit
def post_magnitudes(at, value):
    """Post fp32 values, none negative; of lanes that have the same one, each."""
    TEXT: gl.constexpr = "st.relaxed.gpu.global.f32 [$1], $2; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(TEXT, "=r,l,f", [at, value], dtype=gl.int32, is_pure=False, pack=1)


@jit
def hear_magnitudes(at):
    """The fp32 value at each address, when it is there."""
    TEXT: gl.constexpr = _hear_one_text()
    return gl.inline_asm_elementwise(TEXT, "=&f,l", [at], dtype=gl.float32, is_pure=False, pack=1)
