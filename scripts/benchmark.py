"""Speed beside torch's own GRUs, into dated JSON under benchmarks/: of a CUDA device where there is one, else of the processor.

python scripts/benchmark.py                # what this machine has
python scripts/benchmark.py cpu --rounds 5 # one of them, and its options (benchmark_cpu.py, benchmark_gpu.py; --help)
python scripts/benchmark.py gpu --shapes 512,32,512
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    words = sys.argv[1:]
    named = words.pop(0) if words and words[0] in ("cpu", "gpu") else None
    device = named or ("gpu" if torch.cuda.is_available() else "cpu")
    script = Path(__file__).with_name(f"benchmark_{device}.py")
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
