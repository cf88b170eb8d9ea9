"""Several processes on one GPU, each with launches of more programs than fit: they end, with the bits of a process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_helpers import skip_unless_hopper

pytestmark = pytest.mark.gpu

_PROCESSES = 3
_WORK = """
import sys, torch
from gruqat_hf.layers import GRULayer
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
structures = [{"kind": "blockdiag", "nblocks": 8}, {"kind": "dense"}, {"kind": "monarch", "nblocks": 8}, {"kind": "butterfly"}]
layers = [GRULayer(64, 512, structure_hidden=structure, device="cuda") for structure in structures]
layers += [GRULayer(64, 1024, device="cuda") for _ in range(2)]  # whose programs all have to be on the GPU at once
x = torch.randn(64, 100, 64, device="cuda")
streams = [torch.cuda.Stream() for _ in layers]
sums = []
for turn in range(8):
    found = []
    torch.cuda.synchronize()
    for layer, stream in zip(layers, streams):
        layer.zero_grad(set_to_none=True)
        with torch.cuda.stream(stream):
            out = layer(x)[0]
            out.square().sum().backward()
            found.append((layer.last_path.split()[0], out))
    torch.cuda.synchronize()
    assert all(path == "hopper" for path, _ in found), found
    results = [out for _, out in found] + [layer.bias_hidden.grad for layer in layers]
    sums.append([result.double().sum().item() for result in results])
assert all(row == sums[0] for row in sums), sums
print(*sums[0])
"""


def test_processes_side_by_side():
    skip_unless_hopper()
    command = [sys.executable, "-c", _WORK]
    root = Path(__file__).resolve().parent.parent
    alone = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stderr[-3000:]
    running = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(_PROCESSES)
    ]
    try:
        for process in running:
            out, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
            assert out == alone.stdout
    finally:
        for process in running:
            process.kill()
