"""Scales and ranges stay fp32 whatever dtype their model is moved to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class KeepsFloat32:
    """Mixin for a module whose own fp32 tensors define bits: ``.to(dtype)`` moves them to a device but does not round them.

    Attributes:
        float32_tensors: names of these tensors; None for all that the module itself owns.
    """

    float32_tensors: ClassVar[frozenset[str] | None] = None

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept_names = self.float32_tensors
        own = {n: t for n, t in {**self._parameters, **self._buffers}.items() if kept_names is None or n in kept_names}
        before = {name: tensor.detach() for name, tensor in own.items() if tensor is not None and tensor.dtype == torch.float32}
        nn.Module._apply(self, fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype == torch.float32:
                continue
            kept = old.to(new.device)
            if name in self._parameters:
                new.data = kept
                if new.grad is not None:
                    new.grad = new.grad.to(kept.dtype)
            else:
                self._buffers[name] = kept
        return self
