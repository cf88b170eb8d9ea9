"""Runs scripts/train_qat.py again and again, killing it each time at another moment, until it comes through.

    python kill_driver.py OUTPUT_DIR POINT... -- ARGUMENTS...

Each point is where one more run dies by SIGKILL: "step:9" before its ninth optimizer step, "backward:3" after its third backward
pass, "torch.save:2" with half of its second file written by torch.save, and so on, see POINTS. The runs are forks of this
process, which spares them the imports. Prints the exit status of each run.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from transformers import TrainerState

from gruqat_hf.layers import GRUStack

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import train_qat  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_of(path: Any) -> None:
    """Cut a file in the middle, as if the process had died while writing it."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.truncate(size // 2)


def _half_written(original: Callable[..., Any]) -> Callable[..., Any]:
    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(value, path, *args, **kwargs)
        half_of(path)

    return save


def _remove(original: Callable[..., Any]) -> Callable[..., Any]:
    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        files = [file for file in Path(path).rglob("*") if file.is_file()]
        for file in files[: len(files) // 2 + 1]:
            file.unlink()

    return rmtree


def _nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None


#: What is patched, and what it does before the process dies.
POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "step": (torch.optim.AdamW, "step", _nothing),
    "backward": (torch.Tensor, "backward", lambda original: original),
    "torch.save": (torch, "save", _half_written),
    "state": (TrainerState, "save_to_json", _half_written),
    "weights": (transformers.modeling_utils, "safe_save_file", _half_written),
    "remove": (shutil, "rmtree", _remove),
    "rename": (Path, "rename", _nothing),
    "calibrate": (train_qat.Run, "calibrate", lambda original: original),
    "freeze": (GRUStack, "freeze", lambda original: original),
}


def arm(point: str) -> None:
    name, _, count = point.partition(":")
    owner, attribute, before_dying = POINTS[name]
    original = getattr(owner, attribute)
    last = before_dying(original)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < int(count):
            return original(*args, **kwargs)
        last(*args, **kwargs)
        return die()

    setattr(owner, attribute, counted)


def main() -> None:
    out, *rest = sys.argv[1:]
    split = rest.index("--")
    for point in [*rest[:split], None]:
        child = os.fork()
        if child == 0:
            if point is not None:
                arm(point)
            status = train_qat.main(["--output_dir", out, *rest[split + 1 :]])
            sys.stdout.flush()
            os._exit(status)
        print(f"{point} {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    main()
