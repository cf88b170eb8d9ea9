"""Second half of the quickstart, in a process of its own: load a checkpoint as anyone would and classify the test digits."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _digits import digits, predict
from torch import set_num_threads
from transformers import AutoModelForSequenceClassification

import gruqat_hf  # noqa: F401  (registers the classes with transformers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("logits", type=Path, help="where the logits go (.npy)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_num_threads(args.threads)
    model = AutoModelForSequenceClassification.from_pretrained(args.checkpoint)
    np.save(args.logits, predict(model, digits().test_x).numpy())


if __name__ == "__main__":
    main()
