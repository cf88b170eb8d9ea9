"""What the quantizers of a model are doing, as numbers for logs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantization import FakeQuantize
from ..quantization.ranks import sum_over_ranks


def quantizer_metrics(model: nn.Module, each: bool = True) -> dict[str, float]:
    """Ranges and saturation of the fake-quantizers that were metered (``quantizer.meter``) since their meters were set.

    Every rank of a distributed run must make the call: counts are summed over all of them.

    Args:
        each: whether to tell every quantizer, by its place, or only the share over all.

    Returns:
        ``qat/saturation``: share of all values that a grid clipped; and for each quantizer ``qat/PLACE/saturation`` and
        ``qat/PLACE/range``, the largest magnitude on its grid (of the widest scale; none for a dynamic one).
    """
    metered = {_place(name): child for name, child in model.named_modules() if isinstance(child, FakeQuantize) and child.meter}
    if not metered:
        return {}
    nothing = torch.zeros(2, dtype=torch.int64, device=next(iter(metered.values())).scale.device)
    counts = sum_over_ranks(torch.stack([_counts(quantizer, nothing) for quantizer in metered.values()]))
    ranges = torch.stack([_range(quantizer) for quantizer in metered.values()])
    table = torch.cat([counts.double(), ranges.double().unsqueeze(1)], dim=1).tolist()  # one wait for the device

    clipped, seen = (sum(row[column] for row in table) for column in (0, 1))
    metrics = {"qat/saturation": clipped / seen} if seen else {}
    if each:
        for (place, quantizer), (clipped, seen, largest) in zip(metered.items(), table):
            if seen:
                metrics[f"qat/{place}/saturation"] = clipped / seen
            if not quantizer.is_dynamic:
                metrics[f"qat/{place}/range"] = largest
    return metrics


def _place(name: str) -> str:
    """ "model.stack.layers.0.1.weight_input.quantizers.blocks" → "layers.0.1.weight_input.blocks"."""
    return name.rpartition("stack.")[2].replace(".quantizers.", ".")


def _counts(quantizer: FakeQuantize, nothing: Tensor) -> Tensor:
    assert quantizer.meter is not None
    return nothing if quantizer.meter.counts is None else quantizer.meter.counts


@torch.no_grad()
def _range(quantizer: FakeQuantize) -> Tensor:
    config, scale = quantizer.config, quantizer.scale.detach()
    if hasattr(scale, "full_tensor"):  # a learned scale under FSDP2; all ranks are here
        scale = scale.full_tensor()
    if quantizer.zero_point is None:
        return scale.abs().max() * config.qmax
    zero = quantizer.zero_point.to(scale.dtype)
    return (scale.abs() * torch.maximum(zero - config.qmin, config.qmax - zero)).max()
