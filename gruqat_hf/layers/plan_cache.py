"""What is prepared from weights, and whether the tensors and modules that it was made from are still what they were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ..scan import Plan, is_capturing

logger = logging.getLogger("gruqat_hf")


@cache
def _tell_once() -> None:
    logger.warning(
        "a layer's weights were made under torch.inference_mode, where PyTorch does not count changes to them, so they are "
        "compared as a whole at every call; build or load the model outside of it, and only run it inside"
    )


class Watch:
    """Whether the tensors and modules inside ``module``, at any depth, are what they were when the watch began: none changed in
    place, replaced, added or moved.

    Checking costs some microseconds, as a single streamed step must not wait for it. It reads version counters, which neither
    fused optimizers nor writes through ``tensor.data`` move: so whoever keeps something by a watch drops it with every forward
    pass that has gradients on, and with ``train()`` and ``eval()``.
    """

    def __init__(self, module: nn.Module) -> None:
        tables = [table for child in module.modules() for table in (child._parameters, child._buffers, child._modules)]
        self._sizes = [(table, len(table)) for table in tables]
        self._slots = [(table, name, value) for table in tables for name, value in table.items()]
        tensors = [value for _, _, value in self._slots if isinstance(value, Tensor)]
        self._versions = [(t, t._version, t.data_ptr()) for t in tensors if not t.is_inference()]
        self._contents = [(t, _fingerprint(t)) for t in tensors if t.is_inference()]
        if self._contents:
            _tell_once()

    def sees_no_change(self) -> bool:
        """Whether everything is as it was."""
        for table, size in self._sizes:
            if len(table) != size:
                return False
        for table, name, value in self._slots:
            if table.get(name) is not value:
                return False
        for tensor, version, address in self._versions:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        # What is captured into a CUDA graph cannot be read meanwhile.
        return all(is_capturing(tensor.device) or _fingerprint(tensor) == content for tensor, content in self._contents)


class CachedPlan:
    """What ``prepare_plan`` gave for a module, good until a tensor or module in it changes; see :class:`Watch`.

    Args:
        module: whose tensors and modules are watched.
        key: everything else that the plan depends on.
        prepare: makes the plan, and says which backend it is of and why; None where no backend has one.
    """

    def __init__(self, module: nn.Module, key: object, prepare: Callable[[], tuple[Plan | None, str]]) -> None:
        # Before the plan is made: what changes meanwhile, in another thread, then counts as a change.
        self._watch = Watch(module)
        self._key = key
        self.plan, self.told = prepare()

    def is_current(self, key: object) -> bool:
        """Whether the plan still holds, and for ``key``."""
        return key == self._key and self._watch.sees_no_change()


def _fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Of a tensor made under inference_mode, which counts no versions: its address and a hash of what it holds."""
    return tensor.data_ptr(), hash(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
