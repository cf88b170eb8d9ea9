"""The linear layer of small heads."""

from __future__ import annotations

from torch import Tensor, nn


class WideLinear(nn.Linear):
    """torch.nn.Linear whose sums run in float64; the result has the type of the weight.

    A float32 product rounds by its order of summation, which depends on the batch size and the device, while the quantized state
    it reads does not. In float64 such differences are gone once the result is rounded, so that logits are as reproducible as the
    state.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` of any float type → ``[..., out_features]``."""
        if input.device.type == "mps":  # which has no float64
            return super().forward(input.to(self.weight.dtype))
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(input.double(), self.weight.double(), bias).to(self.weight.dtype)


class VocabularyLinear(WideLinear):
    """A :class:`WideLinear` that trains in the type of its weight: over a vocabulary, float64 would cost too much there."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` of any float type → ``[..., out_features]``."""
        if self.training:
            return nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias)
        return super().forward(input)
