"""Operands: the three forms of a weight that a scan ever sees (block-diagonal, diagonal, monarch)."""

from .block_diagonal import BlockDiagonalOperand
from .diagonal import DiagonalOperand
from .factor import Factor
from .monarch import MonarchOperand
from .operand import Operand

__all__ = ["BlockDiagonalOperand", "DiagonalOperand", "Factor", "MonarchOperand", "Operand"]
