"""scikit-learn's 1,797 handwritten digits as sequences: 8 steps (rows, top to bottom) of 8 pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

FOLDS = 5
BATCH = 64


class Digits(NamedTuple):
    """Pixels ``[N, 8, 8]`` in [-1, 1] (images, rows, pixels) and labels ``[N]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(fold: int = 0) -> Digits:
    """A fifth of the images as the test set, the rest for training; every image is in one fold's test set.

    Args:
        fold: 0 to 4.
    """
    images, labels = load_digits(return_X_y=True)
    train, test = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(images, labels))[fold]
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 8 - 1
    y = torch.tensor(labels, dtype=torch.int64)
    return Digits(x[train], y[train], x[test], y[test])


@torch.inference_mode()
def predict(model, x: Tensor) -> Tensor:
    """Logits ``[N, 10]`` of a sequence classifier for images ``[N, 8, 8]``; leaves the model in eval mode."""
    model.eval()
    return torch.cat([model(inputs_embeds=batch).logits for batch in x.split(BATCH)])
