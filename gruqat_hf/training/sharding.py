"""Whether a model's weights are spread over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed's third stage holds only a part of the weights in this process."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
