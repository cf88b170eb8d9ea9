"""The three states of a GRU and the ways between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..quantization import FakeQuantize
from ..quantization.ranks import all_ranks, is_main_rank


class QuantState(str, Enum):
    """float → prepare_qat() → qat → calibrate() (optional) → freeze() → frozen → dequantize() → float."""

    FLOAT = "float"
    QAT = "qat"
    FROZEN = "frozen"

    def __str__(self) -> str:
        return self.value


class LifecycleError(RuntimeError):
    """A call that the present state does not allow; the message names the call that would be right."""


_ADVICE: dict[tuple[str, QuantState], str] = {
    ("prepare_qat", QuantState.QAT): "it is in QAT already; to change the recipe, freeze(), dequantize() and prepare_qat() again",
    ("prepare_qat", QuantState.FROZEN): "its weights are integers; call dequantize() first",
    ("calibrate", QuantState.FLOAT): "it has no quantizers; call prepare_qat(recipe) first",
    ("calibrate", QuantState.FROZEN): "its scales are fixed; call dequantize(), prepare_qat(recipe) and calibrate(loader) again",
    ("freeze", QuantState.FLOAT): "there is nothing to freeze; call prepare_qat(recipe) first",
    ("freeze", QuantState.FROZEN): "it is frozen already; save_pretrained() it, or dequantize() to train on",
    ("dequantize", QuantState.FLOAT): "it is in float already; prepare_qat(recipe) is the way on",
    ("dequantize", QuantState.QAT): "its weights are float already and its quantizers would be lost; call freeze() first",
}


def require_state(call: str, state: QuantState, allowed: QuantState) -> None:
    """Refuse ``call`` unless ``state`` is ``allowed``.

    Raises:
        LifecycleError: naming the state and the call that would be right.
    """
    if state != allowed:
        raise LifecycleError(f"{call}() needs the {allowed} state, but this is {state}: {_ADVICE[call, state]}")


def require_calibrated(missing: list[str]) -> None:
    """Refuse to freeze while ``missing`` names quantizers without a scale.

    Raises:
        LifecycleError: naming them and the calls that would be right.
    """
    if missing:
        raise LifecycleError(
            f"freeze() needs a scale for {', '.join(missing)}, which observed nothing yet; call calibrate(loader) first, or use "
            "preset 'int8_dynamic', which needs no calibration"
        )


def fake_quantizers(module: nn.Module) -> Iterator[FakeQuantize]:
    """All fake-quantizers inside ``module``."""
    return (child for child in module.modules() if isinstance(child, FakeQuantize))


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, with every observer switched on; modes and switches are put back at the end."""
    modes = [(child, child.training) for child in module.modules()]
    quantizers = list(fake_quantizers(module))
    module.eval()
    for quantizer in quantizers:
        quantizer.calibrating = True
    try:
        with torch.no_grad():
            yield
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
        for child, training in modes:
            child.training = training


def run_calibration(
    module: nn.Module, loader: Iterable[Any], forward: Callable[[Any], object], n_batches: int | None, progress: bool = True
) -> None:
    """Run up to ``n_batches`` batches of ``loader`` through ``forward`` with observers on.

    Under torch.distributed every rank must make the call, each with its own share of the data; it ends with the shortest.

    Raises:
        ValueError: n_batches below 1, or a loader that gave no batch.
    """
    if n_batches is not None and n_batches < 1:
        raise ValueError(f"calibrate(n_batches={n_batches}) must see at least 1 batch; None means all of the loader")
    total = n_batches
    if hasattr(loader, "__len__"):
        total = len(loader) if n_batches is None else min(n_batches, len(loader))
    seen = 0
    show = progress and is_main_rank()
    device = next((tensor.device for group in (module.parameters(), module.buffers()) for tensor in group), torch.device("cpu"))
    batches, end = iter(loader), object()
    with calibrating(module), tqdm(total=total, desc="calibrate", unit="batch", disable=not show, leave=False) as bar:
        while seen != n_batches:
            batch = next(batches, end)
            if not all_ranks(batch is not end, device):
                break
            forward(batch)
            seen += 1
            bar.update()
    if seen == 0:
        raise ValueError("calibrate(loader): the loader gave no batch; pass one that yields inputs")
