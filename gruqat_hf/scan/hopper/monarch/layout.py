"""How a two-factor operand lies over the programs of a cluster, and its weights packed so.

Program ``c`` of C has BLOCK = H / C channels of either kind: as inputs of the first factor those in a row, ``c * BLOCK`` and on;
as outputs, and as mid values, every C-th one, ``u * C + c``. Both factors then are C blocks of BLOCK x BLOCK: several small
blocks of either factor make one of these, with zeros in between.

What a program computes goes to all others in equal shares of SHARE = BLOCK / C values: of its mid values to the program that has
them in its second block, of its outputs to the one that has them in its first. Numbered ``u = program * SHARE + i``, both lie as
the product's rows do: a thread's two are neighbours, and of one share. In memory, sequences have a program's channels together in
this numbering, channel ``u * C + c`` at place ``c * BLOCK + u`` of its row, so that a thread's two are one access: the exchange
order. ``triton/transposition.py`` gets there and back.

Shares arrive in the order of their senders, number ``p = sender * SHARE + i``, as chunks of 8 values of a row of the batch, 16
bytes, 8 chunks to a line (4 where a program has 32 channels):

    [p // 64][row][p // 8 % 8][p % 8]

with chunks of a line shifted from row to row, for the sake of banks. Of a product's right side, lane ``4 * i + j`` then reads
chunk ``j`` of half ``i % 2`` of row ``i // 2``; inputs are named for that, as in the dense kernel.
"""

from __future__ import annotations

from torch import Tensor

#: Programs of a cluster, best first, and channels of a program that the kernels are made for.
_PROGRAMS, _BLOCKS = (8, 4, 16), (32, 64, 128)


def programs_of(first: tuple[int, ...], second: tuple[int, ...]) -> int | None:
    """Programs for factors of shapes ``[g, k, p, p]`` and ``[3, l, s, s]``, or None where there is no such layout."""
    hidden = first[1] * first[2]
    for programs in _PROGRAMS:
        block = hidden // programs
        divides = first[1] % programs == 0 and second[1] % programs == 0
        fits = first[0] == 1 or block < 128  # registers hold 4 blocks of 128, not 6
        if divides and fits and block in _BLOCKS and block % (2 * programs) == 0:
            return programs
    return None


def first_blocks(first: Tensor, programs: int) -> Tensor:
    """``[g, k, q, p]`` → ``[g, C, BLOCK, BLOCK]``, out and in as channels lie in a row."""
    gates, blocks, out, size = first.shape
    together = blocks // programs
    wide = first.new_zeros(gates, programs, together, out, together, size)
    own = first.reshape(gates, programs, together, out, size)
    wide.diagonal(dim1=2, dim2=4).copy_(own.permute(0, 1, 3, 4, 2))
    return wide.view(gates, programs, together * out, together * size)


def second_blocks(second: Tensor, programs: int) -> Tensor:
    """``[3, l, q, r]`` → ``[3, C, BLOCK, BLOCK]``, out and in as numbered in a program's every C-th channel."""
    gates, blocks, out, size = second.shape
    together = blocks // programs
    wide = second.new_zeros(gates, programs, out, together, size, together)
    own = second.reshape(gates, together, programs, out, size)
    wide.diagonal(dim1=3, dim2=5).copy_(own.permute(0, 2, 3, 4, 1))
    return wide.view(gates, programs, out * together, size * together)


def by_share(values: Tensor, dim: int, programs: int) -> Tensor:
    """A dimension of channels in a row, ``i * C + program``, as ``program * SHARE + i``."""
    return values.unflatten(dim, (-1, programs)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def as_inputs(weight: Tensor) -> Tensor:
    """The last dimension, numbered as values arrive, as a product's columns."""
    *rest, block = weight.shape
    # [p // 32][chunk][two pairs of pairs] -> 16 columns: of each lane, that is chunk, two pairs 8 apart.
    weight = weight.reshape(*rest, block // 32, 4, 2, 2, 2)
    n = len(rest)
    return weight.permute(*range(n), n, n + 2, n + 3, n + 1, n + 4).reshape(*rest, block).contiguous()


def pack_first(first: Tensor, programs: int) -> Tensor:
    """``[g, k, p, p]`` → ``[g, C, BLOCK, BLOCK]`` as the forward kernel reads it: out by share, in as it arrives."""
    wide = first_blocks(first, programs)
    return as_inputs(by_share(by_share(wide, 2, programs), 3, programs))


def pack_second(second: Tensor, programs: int) -> Tensor:
    """``[3, l, s, s]`` → ``[3, C, BLOCK, BLOCK]``, likewise: both of its sides are in that order already."""
    return as_inputs(second_blocks(second, programs))


# Of the backward scan, which goes the other way round: a program's channels times its block of the second factor give mid
# values' gradients by share; what arrives of these, times its block of the first, gives inputs' gradients, which go to the
# programs that have these channels as outputs, and arrive there in their order.


def pack_first_back(first: Tensor, programs: int) -> Tensor:
    """``[g, k, p, p]`` → ``[g, C, BLOCK, BLOCK]`` transposed: out by share, in as it arrives."""
    return pack_first(first.transpose(-1, -2), programs)


def pack_second_back(second: Tensor, programs: int) -> Tensor:
    """``[3, l, s, s]`` → ``[3, C, BLOCK, BLOCK]`` transposed: both of its sides are in that order already."""
    return as_inputs(second_blocks(second, programs).transpose(-1, -2))
