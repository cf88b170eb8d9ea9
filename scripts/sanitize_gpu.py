"""Runs every Hopper kernel under compute-sanitizer, which comes with CUDA's toolkit: memcheck for accesses out of bounds,
racecheck for hazards in shared memory.

    python scripts/sanitize_gpu.py                     # both tools, all families; some minutes
    python scripts/sanitize_gpu.py --tools memcheck --families dense
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Hidden weights and channels.
STRUCTURES = {
    "block_diagonal": ({"kind": "blockdiag", "nblocks": 8}, 512),
    "dense": ({"kind": "dense"}, 512),
    "dense_wide": ({"kind": "dense"}, 1024),
    "monarch": ({"kind": "monarch", "nblocks": 8}, 512),
    "butterfly": ({"kind": "butterfly"}, 512),
}
#: Odd numbers of steps and rows, fewer rows than a tile has and more.
SHAPES = ((5, 3), (18, 9))
#: Of large blocks, as many more as tiles of 4 rows and of 8 are for, and more than clusters of 16 programs, or groups of 32, take
#: at once, so that tiles take turns.
MORE = ((6, 20), (5, 33), (5, 70))


def run_kernels(families: list[str]) -> None:
    """Forward and backward scans, float and quantized, with and without masks: what the sanitizer watches."""
    import torch

    from gruqat_hf.layers import GRULayer

    torch.set_float32_matmul_precision("high")
    for family in families:
        structure, hidden = STRUCTURES[family]
        for recipe in (None, "int8_state16"):
            shapes = (*SHAPES, *MORE) if family.startswith("dense") else SHAPES
            for (steps, rows), reverse in zip(shapes, cycle((False, True))):
                layer = GRULayer(32, hidden, structure_hidden=structure, recipe=recipe, reverse=reverse, device="cuda")
                layer.backend = "hopper"
                x, h0 = torch.randn(steps, rows, 32, device="cuda"), torch.rand(rows, hidden, device="cuda")
                mask = torch.rand(steps, rows, device="cuda") > 0.3 if reverse else None
                layer.train()(x, h0, mask)[0].sum().backward()
                with torch.no_grad():
                    layer.eval()(x, h0, mask)
                torch.cuda.synchronize()
    print("kernels ran:", ", ".join(families))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=("memcheck", "racecheck"), default=["memcheck", "racecheck"])
    parser.add_argument("--families", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_kernels(arguments.families)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        sys.exit("scripts/sanitize_gpu.py needs compute-sanitizer, of CUDA's toolkit, on the PATH")
    # Without PyTorch's cache of memory each tensor is an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    own = [sys.executable, str(Path(__file__).resolve()), "--inside", "--families"]
    failed = False
    for tool in arguments.tools:
        for family in arguments.families:
            command = [sanitizer, "--tool", tool, *own, family]
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
            found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout)
            clean = done.returncode == 0 and bool(found) and all(re.search(r": 0 (errors|hazards)", line) for line in found)
            failed |= not clean
            print(f"{tool} {family}: {'; '.join(found) or 'no summary'}", flush=True)
            if not clean:
                print(done.stdout[-1500:] + done.stderr[-500:])
    sys.exit(failed)


if __name__ == "__main__":
    main()
