"""Values that the programs of a cluster send into each other's shared memory.

Every program has the same area: some slots, and for each a barrier, which counts the bytes that arrive. ``st.async`` writes 4 or
16 bytes into a slot of another program and counts them there; a program that waits for a barrier so waits for the values alone,
and no message has to say that they are there. Whoever waits also tells the barrier how much the slot's next round will bring.

A slot is free for another round when all warps of its program have read it. That nobody has to say either, if rounds of
different slots follow one another: a program sends the next round only after it has read this one. Where all warps of a program
meet at a barrier in between, two slots in turn are enough: whoever has all of round ``i + 1`` knows that everyone has read round
``i``. Where warps go on by themselves it takes three: all of round ``i + 2`` comes from programs that have all of round ``i +
1``, which comes from warps that have read round ``i``.

Triton's own shared memory begins where ``global_smem`` says, a name of its PTX, and what it allocates there has no address that a
kernel could ask for. So a launch asks for more than Triton does, by :func:`area_bytes`, and the area is the end of it, which only
:func:`open_exchange` knows: Gluon does not, values come from and go to registers. ``AREA`` is what :func:`area_shape` gives, and
``base`` the area's address.
"""

from __future__ import annotations

from .gluon import constexpr_function, gl, jit


@constexpr_function
def area_shape(BYTES, TIMES=1, EXTRA=0):
    """The area whose slots have BYTES each, a tuple, that TIMES over, and one more of EXTRA bytes, if any."""
    return tuple(BYTES) * TIMES + ((EXTRA,) if EXTRA else ())


@constexpr_function
def area_bytes(AREA):
    """Shared memory that an area takes, with its barriers: a multiple of 128."""
    return -(-(sum(AREA) + 8 * len(AREA)) // 128) * 128


@constexpr_function
def _place(AREA, SLOT):
    """Where a slot and its barrier are in the area, and the slot's bytes."""
    return sum(AREA[:SLOT]), sum(AREA) + 8 * SLOT, AREA[SLOT]


@constexpr_function
def _open_text(AREA, PROGRAMS):
    places = [_place(AREA, slot) for slot in range(len(AREA))]
    text = f"""{{ .reg .pred first, alone; .reg .b32 begin, size, thread, programs; .reg .b64 state;
        mov.u32 programs, %cluster_nctaid.x; setp.ne.u32 alone, programs, {PROGRAMS};
        @alone trap;
        mov.u32 begin, global_smem; mov.u32 size, %dynamic_smem_size;
        add.u32 $0, begin, size; sub.u32 $0, $0, {area_bytes(AREA)};
        mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
        """
    for _, barrier, _ in places:
        text += f"@first mbarrier.init.shared::cta.b64 [$0+{barrier}], 1;\n"
    text += "@first fence.mbarrier_init.release.cluster; bar.warp.sync 0xffffffff;\n"
    for _, barrier, size in places:
        text += f"@first mbarrier.arrive.expect_tx.shared::cta.b64 state, [$0+{barrier}], {size};\n"
    return text + "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; }"


@constexpr_function
def _expect_text(AREA, SLOT):
    _, barrier, size = _place(AREA, SLOT)
    return f"""{{ .reg .pred first; .reg .b32 thread; .reg .b64 state;
        mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 state, [$1+{barrier}], {size};
        mov.u32 $0, 0; }}"""


@constexpr_function
def _wait_text(AREA, SLOT, AGAIN):
    barrier = _place(AREA, SLOT)[1]
    text = f"""{{ .reg .pred done;
        again: mbarrier.try_wait.parity.shared::cta.b64 done, [$1+{barrier}], $2;
        @!done bra again;
        """
    return text + (_expect_text(AREA, SLOT) if AGAIN else "mov.u32 $0, 0;") + " }"


@constexpr_function
def _read_text(AREA, SLOT, COUNT, STRIDE):
    text = ""
    for i in range(COUNT):
        words = ", ".join(f"${4 * i + word}" for word in range(4))
        text += f"ld.shared.v4.b32 {{{words}}}, [${4 * COUNT}+{_place(AREA, SLOT)[0] + i * STRIDE}];\n"
    return text


@constexpr_function
def _read_one_text(AREA, SLOT, BITS):
    return f"ld.shared.b{BITS} $0, [$1+{_place(AREA, SLOT)[0]}];"


@constexpr_function
def _send_text(AREA, SLOT, WORDS, PACK, CHOSEN=False):
    slot, barrier, _ = _place(AREA, SLOT)
    words = ", ".join(f"${PACK + word}" for word in range(WORDS))
    vector, words = (".v4", f"{{{words}}}") if WORDS == 4 else ("", words)
    area, to = f"${PACK + WORDS}", f"${2 * PACK + WORDS}"
    text = f"st.async.shared::cluster.mbarrier::complete_tx::bytes{vector}.b32 [{to}+{slot}], {words}, [{area}+{barrier}];\n"
    if CHOSEN:
        text = f".reg .pred chosen; setp.ne.b32 chosen, ${3 * PACK + WORDS}, 0;\n@chosen {text}"
    text = "{ " + text
    return text + " ".join(f"mov.u32 ${i}, 0;" for i in range(PACK)) + " }"


@constexpr_function
def _registers(OUTPUTS, INPUTS):
    """Outputs that are written before inputs are read, and inputs."""
    return ",".join(["=&r"] * OUTPUTS + ["r"] * INPUTS)


@jit
def open_exchange(AREA: gl.constexpr, PROGRAMS: gl.constexpr):
    """Await all programs: from here on they may send, each slot's first round. Gives ``base``.

    A kernel that was not launched as a cluster of PROGRAMS, nor then with memory for the area, stops here.
    """
    # Were this all that a kernel has of Triton's memory, its PTX would not know the name.
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    line = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    line.store(gl.full([32], 0, gl.int32, layout=LINE))
    return gl.inline_asm_elementwise(_open_text(AREA, PROGRAMS), "=&r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def close_exchange():
    """Await all programs: none ends while others might still send to it."""
    TEXT: gl.constexpr = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.u32 $0, 0;"
    gl.inline_asm_elementwise(TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@jit
def area_of(rank, base):
    """The address of the area of the program ``rank``, for each element."""
    TEXT: gl.constexpr = "mapa.shared::cluster.u32 $0, $1, $2;"
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [rank * 0 + base, rank], dtype=gl.int32, is_pure=False, pack=1)


@jit
def wait_for_round(base, count, SLOT: gl.constexpr, AREA: gl.constexpr, AGAIN: gl.constexpr = True):
    """Until all of a slot's round is here, the first of which has ``count`` 0. AGAIN: another one will come."""
    TEXT: gl.constexpr = _wait_text(AREA, SLOT, AGAIN)
    gl.inline_asm_elementwise(TEXT, "=r,r,r", [base, count % 2], dtype=gl.int32, is_pure=False, pack=1)


@jit
def expect_round(base, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Another round will come to a slot: what ``wait_for_round`` says by itself, unless something has to be done first.

    What arrives before is counted too, and no round ends before it was expected.
    """
    TEXT: gl.constexpr = _expect_text(AREA, SLOT)
    gl.inline_asm_elementwise(TEXT, "=r,r", [base], dtype=gl.int32, is_pure=False, pack=1)


@jit
def read_chunks(
    at, SLOT: gl.constexpr, AREA: gl.constexpr, COUNT: gl.constexpr, STRIDE: gl.constexpr, DTYPE: gl.constexpr = gl.float16
):
    """Values in the layout of ``at``: a thread's are COUNT chunks of 16 bytes, STRIDE apart from its first ``at`` on, which is
    ``base`` plus the place in a slot."""
    TEXT: gl.constexpr = _read_text(AREA, SLOT, COUNT, STRIDE)
    PACK: gl.constexpr = 128 // DTYPE.primitive_bitwidth * COUNT
    REGISTERS: gl.constexpr = _registers(4 * COUNT, PACK)
    return gl.inline_asm_elementwise(TEXT, REGISTERS, [at], dtype=DTYPE.value, is_pure=False, pack=PACK)


@jit
def read_halves(at, SLOT: gl.constexpr, AREA: gl.constexpr):
    """The fp16 value at each ``at``, likewise."""
    return gl.inline_asm_elementwise(_read_one_text(AREA, SLOT, 16), "=h,r", [at], dtype=gl.float16, is_pure=False, pack=1)


@jit
def read_pairs(at, SLOT: gl.constexpr, AREA: gl.constexpr):
    """fp16 values in the layout of ``at``: each 2 of a thread are 4 bytes at their first ``at``."""
    TEXT: gl.constexpr = _read_one_text(AREA, SLOT, 32)
    return gl.inline_asm_elementwise(TEXT, "=r,r,r", [at], dtype=gl.float16, is_pure=False, pack=2)


@jit
def read_floats(at, SLOT: gl.constexpr, AREA: gl.constexpr):
    """The fp32 value at each ``at``, likewise."""
    return gl.inline_asm_elementwise(_read_one_text(AREA, SLOT, 32), "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)


@jit
def send_chunks(values, area, to, SLOT: gl.constexpr, AREA: gl.constexpr, chosen=None):
    """Values of a thread as chunks of 16 bytes. ``to`` is ``area`` plus the place in a slot, of a chunk's first. Chunks are sent
    where ``chosen``, int32, is not 0; all, if it is None."""
    PACK: gl.constexpr = 128 // values.dtype.primitive_bitwidth
    if chosen is None:
        TEXT: gl.constexpr = _send_text(AREA, SLOT, 4, PACK)
        REGISTERS: gl.constexpr = _registers(PACK, 4 + 2 * PACK)
        gl.inline_asm_elementwise(TEXT, REGISTERS, [values, area, to], dtype=gl.int32, is_pure=False, pack=PACK)
    else:
        SOME: gl.constexpr = _send_text(AREA, SLOT, 4, PACK, True)
        MORE: gl.constexpr = _registers(PACK, 4 + 3 * PACK)
        gl.inline_asm_elementwise(SOME, MORE, [values, area, to, chosen], dtype=gl.int32, is_pure=False, pack=PACK)


@jit
def send_pairs(values, area, to, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Each 2 fp16 values of a thread, likewise."""
    TEXT: gl.constexpr = _send_text(AREA, SLOT, 1, 2)
    gl.inline_asm_elementwise(TEXT, _registers(2, 5), [values, area, to], dtype=gl.int32, is_pure=False, pack=2)


@jit
def send_floats(values, area, to, SLOT: gl.constexpr, AREA: gl.constexpr):
    """Each fp32 value, likewise."""
    TEXT: gl.constexpr = _send_text(AREA, SLOT, 1, 1)
    gl.inline_asm_elementwise(TEXT, "=&r,f,r,r", [values, area, to], dtype=gl.int32, is_pure=False, pack=1)
