"""What the ranks of torch.distributed do together; in a single process nothing is communicated."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several ranks work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main_rank() -> bool:
    """Whether this is the only rank, or the first."""
    return not is_distributed() or dist.get_rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Elementwise sum of the ranks' values."""
    if is_distributed():
        value = value.clone()
        dist.all_reduce(value)
    return value


def all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on every rank; ``device`` is one that the process group can reduce on."""
    if not is_distributed():
        return flag
    agreed = torch.tensor(int(flag), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)
