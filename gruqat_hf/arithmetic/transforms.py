"""What PyTorch's transforms and compilers must see as one function, and when nobody looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active: its tensors are wrappers, which hold no values."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def needs_function(x: Tensor) -> bool:
    """Whether an autograd function of ``x`` must be called as such; calling it takes longer than short operations do."""
    return (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling() or is_transformed()


class Elementwise(torch.autograd.Function):
    """A function of a tensor's values one by one, with further arguments that are no tensors; mapped as a whole by vmap."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int | None]:  # type: ignore[override]
        return cls.apply(x, *rest), in_dims[0]
