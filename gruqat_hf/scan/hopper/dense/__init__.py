"""Hopper kernels for blocks that one program cannot hold: programs of a cluster share one, or more of them of a grid, and hand
its state round each step."""

from __future__ import annotations

from ...inputs import ScanInputs
from ...spec import ScanSpec
from ...triton import dense as portable
from ...triton.device import DeviceFacts
from ...triton.precision import spec_of
from ..cluster import refuses_clusters
from ..device import refuses_hopper
from ..products import refuses_products

SAVES_GATES = True
#: Half-precision gates are kept as ``[T, B, H, 4]``, as in the portable tier, whose backward kernel can read them.
PACKS_GATES = True
SUMS_WEIGHTS = False
SUMS_BIAS = True

#: Steps whose inputs a program has on their way, this one included; even.
STAGES = 4
#: Steps of a backward scan between two looks at the size of gradients; even.
RESCALE = 16
#: Largest blocks of which a cluster holds the weights in fp16; as 8-bit codes it does all that these kernels take.
LARGEST_HALF = 512
#: Largest blocks: of more than LARGEST_HALF, 32 programs of a grid hold the fp16 weights.
_LARGEST = 1024
#: Blocks beyond which 8-bit codes are multiplied as such: half of the exchange. Of smaller ones a cluster has 8 programs.
_BYTES_BEYOND = 256
#: Elements that 16 bytes hold at most: copies of a row go in such pieces.
_PIECE = 8
#: Largest code of 8 bits, of a symmetric grid.
_LARGEST_BYTE = 127


def padded_size(size: int) -> int:
    """Channels that programs compute for a block in fp16: 32 for each of the 8 or 16 of a cluster, or the 32 of a grid."""
    return next(padded for padded in (256, LARGEST_HALF, _LARGEST) if size <= padded)


def byte_channels(size: int) -> int:
    """Channels of each of the 16 programs that share a block of 8-bit codes."""
    return 32 if size <= 512 else 64


def multiplies_bytes(scan: ScanInputs | ScanSpec) -> bool:
    """Whether a forward scan multiplies 8-bit codes; else fp16 operands."""
    (factor,) = scan.operand.factors.values()
    grid = scan.grids.h
    if not scan.quantized or grid is None or max(factor.qmax, grid.magnitude) > _LARGEST_BYTE:
        return False
    return factor.values.shape[-1] > _BYTES_BEYOND


def refuses(inputs: ScanInputs, facts: DeviceFacts) -> str | None:
    """Why these kernels cannot run a scan, or None if they can."""
    if (reason := refuses_hopper(facts)) is not None:
        return reason
    (factor,) = inputs.operand.factors.values()
    size, columns = factor.values.shape[-2:]
    if size > _LARGEST or size % _PIECE != 0 or columns != size:
        most = f"at most {_LARGEST} channels, in multiples of {_PIECE}"
        return f"these kernels take square blocks of {most}, not {size} x {columns}"
    if (reason := refuses_products(inputs)) is not None:
        return reason
    exact = spec_of(inputs).exact
    if exact and inputs.needs_grad and (reason := portable.refuses(inputs, facts)) is not None:
        return f"gradients as exact as fp32 are the portable kernels', but {reason}"
    programs, as_bytes = padded_size(size) // 32, multiplies_bytes(inputs)
    if size > LARGEST_HALF and ((inputs.needs_grad and not exact) or not as_bytes):
        together = programs * factor.values.shape[1]
        if together > facts.processors:
            return f"blocks of {size} channels need {together} programs at once, and the GPU has {facts.processors} processors"
        if not as_bytes:
            return None
    return refuses_clusters(16 if as_bytes else programs, inputs.gi.device.index)
