"""Times layers on a GPU beside cuDNN, nn.GRU on the CPU and gru-qat 0.5.0 (where installed), all in one run.

    python scripts/benchmark.py gpu                               # everything; writes benchmarks/gpu-DATE.json
    python scripts/benchmark.py gpu --shapes 512,32,512 --structures diagonal dense --only ours

Medians in milliseconds. Errors stand beside times: of float layers the relative distance of the outputs from a float64 loop, of
quantized ones the number of output values that differ from the reference's, over the first 64 steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from torch import Tensor, nn
from tqdm.auto import tqdm

from gruqat_hf.layers import GRULayer

HERE = Path(__file__).resolve().parent
SHAPES = [(64, 32, 512), (512, 32, 512), (512, 128, 512), (256, 32, 1024), (1024, 1, 512)]
STRUCTURES: dict[str, dict[str, Any]] = {
    "diagonal": {"kind": "diagonal"},
    "blockdiag8": {"kind": "blockdiag", "nblocks": 8},
    "blockdiag4": {"kind": "blockdiag", "nblocks": 4},
    "monarch8": {"kind": "monarch", "nblocks": 8},
    "butterfly": {"kind": "butterfly"},
    "dense": {"kind": "dense"},
    "circulant": {"kind": "circulant"},
    "ldr": {"kind": "ldr"},
}
#: Those that gru-qat has a kernel for.
PEER_STRUCTURES = ("diagonal", "blockdiag8", "blockdiag4", "monarch8", "butterfly")
PRESET = "int8_state16"
#: Where the portable kernels are timed as well, if others are chosen.
PORTABLE_SHAPE = (512, 32, 512)
_CHECKED_STEPS = 64
#: A call of more milliseconds than this is not captured as well: nothing but the kernels counts.
_LONG = 100.0


class Bench:
    """Rows of results, and the clocks that fill them."""

    def __init__(self, milliseconds: int, device: str) -> None:
        self.milliseconds, self.device = milliseconds, device
        self.rows: list[dict[str, Any]] = []

    def median(self, call: Callable[[], object]) -> float:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=max(1, self.milliseconds // 4), rep=self.milliseconds, return_mode="median"))

    def captured(self, call: Callable[[], object]) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.median(graph.replay)

    def measure(
        self, call: Callable[[], object], what: dict[str, Any], extra: Callable[[], dict[str, Any]] | None = None
    ) -> None:
        """One row for the eager call and one for its CUDA graph; a failure becomes a row with its reason."""
        for launch, clock in (("eager", self.median), ("graph", self.captured)):
            row = {**what, "launch": launch}
            if launch == "graph" and self.rows[-1].get("ms", 0.0) > _LONG:
                return
            try:
                call()
                row["ms"] = round(clock(call), 5)
                if launch == "eager":
                    row.update(self._peak(call) if what["mode"] == "train" else self._host(call))
                    row.update(extra() if extra is not None else {})
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                torch.cuda.synchronize()
            self.rows.append(row)

    def _peak(self, call: Callable[[], object]) -> dict[str, Any]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return {"peak_mb": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}

    def _host(self, call: Callable[[], object], calls: int = 10) -> dict[str, Any]:
        """Time until a call returns, the device not waited for."""
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return {"host_us": round(sorted(times)[3] * 1e6, 1)}


def infer(module: Callable[[Tensor], Any], x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def train(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def call() -> None:
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    return call


@torch.no_grad()
def float_error(layer: GRULayer, x: Tensor) -> dict[str, Any]:
    from copy import deepcopy

    wanted = deepcopy(layer).double()
    wanted.backend = "reference"
    x = x[:_CHECKED_STEPS]
    found, wanted_out = layer(x)[0].double(), wanted(x.double())[0]
    return {"error": float((found - wanted_out).norm() / wanted_out.norm()), "path": layer.last_path}


@torch.no_grad()
def cudnn_error(gru: nn.GRU, x: Tensor) -> dict[str, Any]:
    from copy import deepcopy

    x = x[:_CHECKED_STEPS]
    found, wanted = gru(x.to(gru.weight_ih_l0.dtype))[0].double(), deepcopy(gru).double()(x.double())[0]
    return {"error": float((found - wanted).norm() / wanted.norm())}


@torch.no_grad()
def differing(layer: GRULayer, x: Tensor) -> dict[str, Any]:
    x, forced = x[:_CHECKED_STEPS], layer.backend
    found, path = layer(x)[0], layer.last_path
    layer.backend = "reference"
    wanted = layer(x)[0]
    layer.backend = forced
    return {"differing": int((found != wanted).sum()), "path": path}


def time_layer(
    bench: Bench, name: str, shape: tuple[int, int, int], x: Tensor, gradient: Tensor, backend: str | None = None
) -> str:
    """A layer in its three states, hidden weights structured, input weights dense; gives the backend that ran it."""
    hidden = shape[2]
    base = {"shape": list(shape), "library": "gruqat-hf" if backend is None else f"gruqat-hf {backend}", "structure": name}
    layer = GRULayer(hidden, hidden, structure_hidden=STRUCTURES[name], device=bench.device).eval()
    layer.backend = backend
    bench.measure(infer(layer, x), {**base, "state": "float", "mode": "infer"}, lambda: float_error(layer, x))
    layer.train()
    bench.measure(train(layer, x, gradient), {**base, "state": "float", "mode": "train"})
    layer.prepare_qat(PRESET)
    layer(x[: min(8, len(x))])
    bench.measure(train(layer, x, gradient), {**base, "state": "qat", "mode": "train"})
    layer.eval().freeze()
    bench.measure(infer(layer, x), {**base, "state": "frozen", "mode": "infer"}, lambda: differing(layer, x))
    return layer.last_path.split()[0]


def time_ours(bench: Bench, name: str, shape: tuple[int, int, int], x: Tensor, gradient: Tensor) -> None:
    """The backend that is chosen and, where that is one for this GPU alone, the portable one beside it."""
    if time_layer(bench, name, shape, x, gradient) == "hopper" and shape == PORTABLE_SHAPE:
        time_layer(bench, name, shape, x, gradient, backend="triton")


def time_cudnn(bench: Bench, shape: tuple[int, int, int], x: Tensor, gradient: Tensor) -> None:
    hidden = shape[2]
    for name, dtype in (("tf32", torch.float32), ("fp16", torch.float16)):
        gru = nn.GRU(hidden, hidden, device=bench.device, dtype=dtype)
        base = {"shape": list(shape), "library": f"cuDNN {name}", "structure": "dense", "state": "float"}
        bench.measure(infer(gru.eval(), x.to(dtype)), {**base, "mode": "infer"}, lambda gru=gru: cudnn_error(gru, x))
        bench.measure(train(gru.train(), x.to(dtype), gradient.to(dtype)), {**base, "mode": "train"})


def time_cpu(bench: Bench, shape: tuple[int, int, int], x: Tensor) -> None:
    gru, x = nn.GRU(shape[2], shape[2]).eval(), x.cpu()
    times: list[float] = []
    with torch.no_grad():
        while len(times) < 3 and sum(times) < 2.0:
            start = time.perf_counter()
            gru(x)
            times.append(time.perf_counter() - start)
    row = {"shape": list(shape), "library": "nn.GRU on the CPU", "structure": "dense", "state": "float", "mode": "infer"}
    bench.rows.append({**row, "launch": "eager", "ms": round(sorted(times)[len(times) // 2] * 1e3, 3)})


def time_gru_qat(bench: Bench, name: str, shape: tuple[int, int, int], x: Tensor, gradient: Tensor) -> None:
    """The float layer of gru-qat, as its documentation builds it for its kernels."""
    from gru_qat import GRULayer as PeerLayer
    from gru_qat import QuantizerConfig, QuantRecipe, StructureConfig

    _, rows, hidden = shape
    off = QuantizerConfig(bits=32)
    recipe = QuantRecipe(weight=QuantizerConfig(bits=32, axis=0), input_act=off, hidden=off)
    base = {"shape": list(shape), "library": "gru-qat 0.5.0", "structure": name, "state": "float"}
    if name == "dense":
        from gru_qat.triton_kernels.scan import gru_scan_persistent

        layer = PeerLayer(hidden, hidden, recipe=recipe, gate_layout="fused", pre_batch_input=True).to(bench.device)
        h0 = torch.zeros(rows, hidden, device=bench.device)

        def forward(x: Tensor) -> tuple[Tensor]:
            weights = layer.cell.quantize_weights()
            projected = layer.cell.input_projection(x, weights)
            return (gru_scan_persistent(projected, h0, weights.Wh_cat, weights.bh_cat),)

        def step() -> None:
            layer.zero_grad(set_to_none=True)
            forward(x)[0].backward(gradient)

        bench.measure(infer(forward, x), {**base, "mode": "infer"})
        bench.measure(step, {**base, "mode": "train"})
        return
    structure = StructureConfig(**STRUCTURES[name])
    layer = PeerLayer(hidden, hidden, recipe=recipe, gate_layout="fused", structure_hidden=structure, use_triton=True)
    layer = layer.to(bench.device)
    bench.measure(infer(layer, x), {**base, "mode": "infer"})
    bench.measure(train(layer, x, gradient), {**base, "mode": "train"})


def jobs(
    bench: Bench, shape: tuple[int, int, int], structures: list[str], only: str | None
) -> list[tuple[str, Callable[[], None]]]:
    """What is timed at one shape: a label and the call that does it."""
    x, gradient = (torch.randn(shape, device=bench.device) for _ in range(2))
    found: list[tuple[str, Callable[[], None]]] = []
    if only in (None, "peers"):
        found.append(("cuDNN", lambda: time_cudnn(bench, shape, x, gradient)))
        found.append(("CPU", lambda: time_cpu(bench, shape, x)))
        try:
            import gru_qat  # noqa: F401
        except ImportError:
            pass
        else:
            for name in structures:
                if name in (*PEER_STRUCTURES, "dense"):
                    found.append((f"gru-qat {name}", lambda name=name: time_gru_qat(bench, name, shape, x, gradient)))
    if only in (None, "ours"):
        for name in structures:
            found.append((name, lambda name=name: time_ours(bench, name, shape, x, gradient)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="T,B,H; default: five")
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--only", choices=("ours", "peers"))
    parser.add_argument("--milliseconds", type=int, default=40, help="that each figure is measured for")
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu-DATE.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shapes] if arguments.shapes else SHAPES
    bench = Bench(arguments.milliseconds, "cuda")
    report = {**environment("cuda"), "settings": {"precision": "high", "preset": PRESET}, "rows": bench.rows}
    out = arguments.out or HERE.parent / "benchmarks" / f"gpu-{report['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        work = jobs(bench, shape, arguments.structures, arguments.only)
        with tqdm(work, desc=str(shape)) as bar:
            for label, call in bar:
                bar.set_postfix_str(label)
                try:
                    call()
                except Exception as error:
                    bench.rows.append(
                        {"shape": list(shape), "library": label, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
                    )
                gc.collect()
                torch.cuda.empty_cache()
                out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
