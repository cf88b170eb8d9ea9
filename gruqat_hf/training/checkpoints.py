"""Checkpoints of a training that may have been killed while it wrote one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest ``checkpoint-N`` in ``folder`` that was written to its end, or None.

    Trainer writes the state of the training last. From a checkpoint without it Trainer would go on with the weights, but start to
    count, to warm up and to shuffle anew, without a word.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = {int(match.group(1)): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    for step in sorted(found, reverse=True):
        if _written_steps(found[step]) == step:
            return str(found[step])
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether ``checkpoint`` was written to its end."""
    return _written_steps(Path(checkpoint)) is not None


def _written_steps(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
