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

#: All ones: two fp16 NaNs, or an fp32 one, that no instruction gives; and the largest integer, which :func:`_until_heard` needs.
SILENCE = -1


def new_mailbox(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Room for int32 words that are posted once; every launch needs its own."""
    return torch.full(shape, SILENCE, dtype=torch.int32, device=device)


@constexpr_function
def _looks(COUNT, STRIDE, TENSORS, DISTANCE, AT):
    """The instructions that read each chunk into four words, ``$0`` and on."""
    places = [tensor * DISTANCE + i * STRIDE for tensor in range(TENSORS) for i in range(COUNT)]
    words = [", ".join(f"${4 * i + word}" for word in range(4)) for i in range(len(places))]
    return [f"ld.relaxed.gpu.global.v4.b32 {{{word}}}, [${AT}+{place}];\n" for word, place in zip(words, places)]


@constexpr_function
def _until_heard(LOOKS):
    """Look again for chunks with silent words, until there are none."""
    text = "again: setp.ne.u32 any, 0, 0;\n"
    for i in range(len(LOOKS)):
        text += f"max.u32 one, ${4 * i}, ${4 * i + 1}; max.u32 other, ${4 * i + 2}, ${4 * i + 3}; max.u32 one, one, other;\n"
        text += f"setp.eq.u32 silent{i}, one, {SILENCE}; or.pred any, any, silent{i};\n"
    return text + "@!any bra heard;\n" + "".join(f"@silent{i} {look}" for i, look in enumerate(LOOKS)) + "bra again;\nheard: "


@constexpr_function
def _hear_text(COUNT, STRIDE, TENSORS, DISTANCE):
    chunks = TENSORS * COUNT
    looks = _looks(COUNT, STRIDE, TENSORS, DISTANCE, 4 * chunks)
    text = f"{{ .reg .pred any, silent<{chunks}>; .reg .b32 one, other, began, now; mov.u32 began, %clock;\n"
    text += "early: mov.u32 now, %clock; sub.u32 now, now, began;\n"
    text += f"setp.lt.u32 any, now, ${4 * chunks + 8 * COUNT};\n@any bra early;\n"
    return text + "".join(looks) + _until_heard(looks) + "}"


@constexpr_function
def _look_text(COUNT, STRIDE):
    return "".join(_looks(COUNT, STRIDE, 1, 0, 4 * COUNT))


@constexpr_function
def _hear_rest_text(COUNT, STRIDE):
    text = f"{{ .reg .pred any, silent<{COUNT}>; .reg .b32 one, other;\n"
    text += "".join(f"mov.b32 ${i}, ${12 * COUNT + i};\n" for i in range(4 * COUNT))
    return text + _until_heard(_looks(COUNT, STRIDE, 1, 0, 4 * COUNT)) + "}"


@constexpr_function
def _hear_one_text():
    return f"""{{ .reg .pred silent; .reg .b32 word;
        again: ld.relaxed.gpu.global.b32 word, [$1];
        setp.eq.u32 silent, word, {SILENCE};
        @silent bra again;
        mov.b32 $0, word; }}"""


@constexpr_function
def _registers(WORDS, ADDRESSES, MORE):
    """Words that are written before all is read; addresses; numbers or words more."""
    return ",".join(["=&r"] * WORDS + ["l"] * ADDRESSES + ["r"] * MORE)


@jit
def _as_many(number, at):
    """A number for each of ``at``, in its layout, as the instructions want it."""
    return gl.full(at.shape, 0, gl.int32, layout=at.type.layout) + number


@jit
def hear_chunks(at, patience, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """fp16 values in the layout of ``at``, when all of a thread's are there: COUNT chunks of 16 bytes, STRIDE bytes apart from
    its first address ``at`` on. Looked for ``patience`` cycles from now, and then again and again."""
    return gl.inline_asm_elementwise(
        _hear_text(COUNT, STRIDE, 1, 0), _registers(4 * COUNT, 8 * COUNT, 8 * COUNT), [at, _as_many(patience, at)],
        dtype=gl.float16, is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@jit
def look(at, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """What is there of the same chunks by now, silent where nothing is: for :func:`hear_rest`, and something else in between."""
    return gl.inline_asm_elementwise(
        _look_text(COUNT, STRIDE), _registers(4 * COUNT, 8 * COUNT, 0), [at],
        dtype=gl.float16, is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@jit
def hear_rest(at, seen, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """What :func:`look` has seen, when all of it is there."""
    return gl.inline_asm_elementwise(
        _hear_rest_text(COUNT, STRIDE), _registers(4 * COUNT, 8 * COUNT, 4 * COUNT), [at, seen],
        dtype=gl.float16, is_pure=False, pack=8 * COUNT,
    )  # fmt: skip


@jit
def hear_three(at, patience, COUNT: gl.constexpr, STRIDE: gl.constexpr, DISTANCE: gl.constexpr):
    """Three such tensors, DISTANCE bytes apart, looked for together."""
    return gl.inline_asm_elementwise(
        _hear_text(COUNT, STRIDE, 3, DISTANCE), _registers(12 * COUNT, 8 * COUNT, 8 * COUNT), [at, _as_many(patience, at)],
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
