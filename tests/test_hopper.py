"""The Hopper tier on a GPU of compute capability 9.0: same contract as the portable kernels, same bits where quantized."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scan_helpers
import torch
from kernel_helpers import Case, Run, check_against_reference, distance, matmul_precision, skip_unless_hopper
from scan_helpers import RECIPES, build, clip, gradients

from gruqat_hf.layers import GRULayer
from gruqat_hf.quantization import PRESETS, QuantizerConfig
from gruqat_hf.scan.triton.choice import choose

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _hopper() -> None:
    skip_unless_hopper()


def blocks(count: int) -> dict[str, object]:
    return {"kind": "blockdiag", "nblocks": count}


TWO_FACTORS = {
    **{f"monarch{count}": ({"kind": "monarch", "nblocks": count}, 512) for count in (4, 8, 16)},
    "monarch8 of 1024": ({"kind": "monarch", "nblocks": 8}, 1024),
    **{f"butterfly{hidden}": ({"kind": "butterfly"}, hidden) for hidden in (128, 256, 512, 1024)},
}
#: Kernels each, with a number of channels that they take.
STRUCTURES = {
    "block-diagonal": (blocks(8), 512),
    "dense": (blocks(1), 512),
    "dense beyond a cluster": (blocks(1), 1024),
    "monarch": ({"kind": "monarch", "nblocks": 8}, 512),
    "butterfly": ({"kind": "butterfly"}, 512),
}
families = pytest.mark.parametrize("structure, hidden", STRUCTURES.values(), ids=STRUCTURES)


def check(layer: GRULayer, steps: int, rows: int, *, masked: bool = False, precision: str = "high") -> None:
    scan_helpers.check(layer, steps, rows, masked=masked, precision=precision, states_within=2e-4, backend="hopper")


@pytest.mark.parametrize("recipe", [None, "int8_per_channel", "int8_state16"])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("masked, reverse", [(False, False), (True, True)])
def test_blocks(count, recipe, masked, reverse):
    check(build(blocks(count), recipe, 512, 128, CUDA, reverse=reverse), 48, 33, masked=masked)


@pytest.mark.parametrize("recipe", [None, "int8_per_channel", "int8_state16"])
@pytest.mark.parametrize("name", TWO_FACTORS)
@pytest.mark.parametrize("masked, reverse", [(False, False), (True, True)])
def test_two_factors(name, recipe, masked, reverse):
    structure, hidden = TWO_FACTORS[name]
    check(build(structure, recipe, hidden, 64, CUDA, reverse=reverse), 35, 21, masked=masked)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("steps", [1, 2, 8, 9, 65])
@families
def test_any_number_of_steps_and_rows(structure, hidden, steps, rows):
    """Quantized as the reference; float as the portable kernels, which round the same operands."""
    check(build(structure, "int8_state16", hidden, 32, CUDA, reverse=steps % 2 == 0), steps, rows, masked=rows == 4)
    layer = build(structure, None, hidden, 32, CUDA, reverse=steps % 2 == 0)
    x, h0 = torch.randn(steps, rows, 32, device=CUDA), torch.rand(rows, hidden, device=CUDA) * 2 - 1
    mask = torch.rand(steps, rows, device=CUDA) > 0.3 if rows == 4 else None
    with matmul_precision("high"):
        out, last, wanted = gradients(layer, "triton", x, h0, mask)
        found_out, found_last, found = gradients(layer, "hopper", x, h0, mask)
    assert distance(found_out, out) <= 5e-5 and distance(found_last, last) <= 5e-5
    assert all(distance(found[key], value) <= 1e-3 for key, value in wanted.items())


@pytest.mark.parametrize("size", [8, 24, 40, 96, 120])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_sizes_that_are_no_powers_of_two(size, recipe):
    check(build(blocks(3), recipe, 3 * size, 37, CUDA), 13, 5, masked=True)


@pytest.mark.parametrize("size", [136, 200, 256, 264, 384, 504])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
def test_large_blocks_of_any_size(size, recipe):
    check(build(blocks(2), recipe, 2 * size, 37, CUDA), 13, 11, masked=True)
    check(build(blocks(1), recipe, size, 37, CUDA, reverse=True), 35, 9)


#: Codes of states less their zero point are more than a byte, and products with weights of 4 bits exact in fp16.
AFFINE_STATES = replace(
    PRESETS["int8_state16"],
    h=QuantizerConfig(symmetric=False, observer="ema"),
    weight_hidden=QuantizerConfig(bits=4, observer="dynamic"),
)


@pytest.mark.parametrize("size", [520, 768, 1000, 1024])
@pytest.mark.parametrize("recipe", [None, "int8_state16", "int8_per_channel", AFFINE_STATES])
def test_blocks_beyond_a_cluster(recipe, size):
    """Of fp16 operands no cluster holds the weights, only of 8-bit codes; of 70 rows tiles take turns, of two blocks in two
    launches, and backward there are three launches or five."""
    check(build(blocks(1), recipe, size, 37, CUDA), 13, 11, masked=True)
    check(build(blocks(1), recipe, size, 37, CUDA, reverse=True), 35, 70)
    check(build(blocks(2), recipe, 2 * size, 37, CUDA), 2, 1)
    check(build(blocks(2), recipe, 2 * size, 37, CUDA), 9, 70, masked=True)


@pytest.mark.parametrize("size", [520, 1024])
@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-4), (torch.float16, 2e-3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_more_steps_than_a_launch_has(reverse, dtype, within, size):
    """Beyond a cluster a launch has 512 steps; others go on from there, and a sequence's end may be an odd one."""
    case = Case(1031, 3, 1, size, masked=True, reverse=reverse, dtype=dtype)
    check_against_reference("hopper_dense", case.inputs("dense", CUDA), within, 4 * within)
    if dtype == torch.float32 and size == 520:
        check_against_reference("hopper_dense", replace(case, quantized=True, affine=True).inputs("dense", CUDA), 0.0, 1e-3)


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("steps", [15, 16, 17, 33])
def test_steps_around_a_look_at_the_largest_gradient(steps, size):
    check_against_reference("hopper_dense", Case(steps, 9, 1, size).inputs("dense", CUDA), 2e-4, 8e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_rows_bits_are_its_own_beyond_a_cluster(reverse):
    """Whatever tile and whatever launch it is in, with up to four in turns; in blocks that a cluster holds,
    test_hopper_turns.py."""
    inputs = Case(40, 150, 1, 1024, reverse=reverse).inputs("dense", CUDA)
    dstates = torch.randn(40, 150, 1024, device=CUDA)
    with matmul_precision("high"):
        run = Run.of("hopper_dense", inputs)
        found = run.backward(dstates, dstates[0])
        for rows in (slice(0, 8), slice(13, 40), slice(33, 66), slice(50, 140), slice(20, 148), slice(148, 150)):
            some = replace(inputs, gi=inputs.gi[:, rows].contiguous(), h0=inputs.h0[rows].contiguous())
            part = Run.of("hopper_dense", some)
            alone = part.backward(dstates[:, rows].contiguous(), dstates[0, rows].contiguous())
            assert torch.equal(part.states, run.states[:, rows])
            assert torch.equal(alone.dgi, found.dgi[:, rows]) and torch.equal(alone.dh0, found.dh0[rows])


def test_more_blocks_than_a_grid_holds_are_inferred_as_bytes():
    """Clusters hold codes of 8 bits, however many blocks there are; their gradients are the portable tier's."""
    layer = build(blocks(5), "int8_state16", 5 * 1024, 16, CUDA)
    layer.backend = "auto"
    x = torch.randn(4, 3, 16, device=CUDA)
    for precision, reason in (("high", "160 programs at once"), ("highest", "gradients as exact as fp32")):
        with matmul_precision(precision):
            with torch.no_grad():
                layer(x)
            assert layer.last_path.startswith("hopper")
            layer(x)
            assert layer.last_path.startswith("triton (hopper: ") and reason in layer.last_path


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count, hidden", [(1, 512), (2, 512), (8, 512), (1, 1024)])
@pytest.mark.parametrize("recipe", ["int8_state16", AFFINE_STATES], ids=["symmetric", "affine"])
def test_nan_spreads_as_in_the_reference(recipe, count, hidden, reverse):
    """From one channel to all of its block, a step later; bytes, which have no NaN, included."""
    layer = build(blocks(count), recipe, hidden, 37, CUDA, reverse=reverse)
    x, h0 = torch.randn(9, 5, 37, device=CUDA), torch.rand(5, hidden, device=CUDA)
    mask = torch.ones(9, 5, dtype=torch.bool, device=CUDA)
    h0[1, 3] = torch.nan
    h0[2, 500] = torch.nan
    mask[[0, 1, -1, -2], 2] = False
    mask[:, 1] = False
    x[4, 3, 7] = torch.nan
    found = []
    with torch.no_grad():
        for backend in ("reference", "hopper"):
            layer.backend = backend
            found.append(layer(x, h0, mask)[0])
    assert torch.equal(found[0].isnan(), found[1].isnan()) and found[0].isnan().any()
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


@families
@pytest.mark.parametrize("recipe", ["learned", "affine"])
def test_states_beyond_their_grids(recipe, structure, hidden):
    """In "highest": sums of a learned scale's gradient cancel so far that what tf32 products and short gates lose shows."""
    check(clip(build(structure, RECIPES[recipe], hidden // 2, 64, CUDA)), 20, 9, masked=True, precision="highest")


@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("size", [16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_alone(size, rows, dtype):
    family = "hopper_block_diagonal" if size <= 128 else "hopper_dense"
    case = Case(31, rows, 4 if size <= 128 else 1024 // size, size, masked=True, reverse=True, bias=False, dtype=dtype)
    within = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    check_against_reference(family, case.inputs("dense", CUDA), within, 4 * within)
    if dtype == torch.float32:
        case = replace(case, quantized=True, per_channel=True, bias=True)
        check_against_reference(family, case.inputs("dense", CUDA), 0.0, 1e-3)


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_factor_kernels_alone(dtype, per_gate, rows):
    case = Case(31, rows, 16, 32, second=(32, 16), per_gate=per_gate, masked=True, reverse=True, bias=False, dtype=dtype)
    within = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    check_against_reference("hopper_monarch", case.inputs("monarch", CUDA), within, 4 * within)
    if dtype == torch.float32:
        case = replace(case, quantized=True, per_channel=True, bias=True)
        check_against_reference("hopper_monarch", case.inputs("monarch", CUDA), 0.0, 1e-3)


@families
def test_gradients_of_any_magnitude(structure, hidden):
    """Half-precision operands of the backward product are scaled: tiny and large gradients keep their accuracy."""
    layer = build(structure, None, hidden, 64, CUDA)
    x, h0 = torch.randn(64, 5, 64, device=CUDA), torch.rand(5, hidden, device=CUDA)
    with matmul_precision("high"):
        for factor in (1e-12, 1.0, 1e8):
            found = []
            for backend in ("reference", "hopper"):
                layer.backend = backend
                leaf = x.clone().requires_grad_()
                (layer(leaf, h0)[0].square().sum() * factor).backward()
                found.append(leaf.grad / factor)
            assert distance(*reversed(found)) <= 1e-3


@families
def test_gradients_that_fade(structure, hidden):
    """Of the last step alone: what is left of them many steps before is as accurate as at the end."""
    layer = build(structure, None, hidden, 64, CUDA)
    x, h0 = torch.randn(96, 9, 64, device=CUDA), torch.rand(9, hidden, device=CUDA)
    found = []
    with matmul_precision("high"):
        for backend in ("reference", "hopper"):
            layer.backend = backend
            leaf = x.clone().requires_grad_()
            layer(leaf, h0)[1].sum().backward()
            found.append(leaf.grad)
    for at in (0, 32, 64, 95):
        assert distance(found[1][at], found[0][at]) <= 5e-3


@pytest.mark.parametrize("rows", [32, 128])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@families
def test_200_repeats_are_equal(structure, hidden, recipe, rows):
    layer = build(structure, recipe, hidden, 64, CUDA)
    x, h0 = torch.randn(64, rows, 64, device=CUDA), torch.rand(rows, hidden, device=CUDA)
    with matmul_precision("high"):
        out, last, wanted = gradients(layer, "hopper", x, h0, None)
        for _ in range(200):
            again, last_again, found = gradients(layer, "hopper", x, h0, None)
            assert torch.equal(again, out) and torch.equal(last_again, last)
            assert all(torch.equal(found[key], value) for key, value in wanted.items())


@families
def test_1024_steps_are_those_of_the_cpu(structure, hidden):
    layer = build(structure, "int8_state16", hidden, 64, torch.device("cpu"))
    x = torch.randn(1024, 2, 64) * 2
    layer.backend = "reference"
    with torch.no_grad(), matmul_precision("high"):
        wanted, _ = layer(x)
        layer.to(CUDA).backend = "hopper"
        found, _ = layer(x.to(CUDA))
    assert torch.equal(found.cpu(), wanted)


def test_streams_side_by_side():
    """More clusters than fit at once, of several launches: they queue, and none waits for another for ever."""
    layers = [build(structure, None, hidden, 64, CUDA) for structure, hidden in STRUCTURES.values()]
    x = torch.randn(64, 100, 64, device=CUDA)
    streams = [torch.cuda.Stream() for _ in layers]
    found = []
    with torch.no_grad(), matmul_precision("high"):
        for layer in layers:
            layer.backend = "hopper"
        wanted = [layer(x)[0] for layer in layers]
        torch.cuda.synchronize()
        for _ in range(20):
            found.clear()
            for layer, stream in zip(layers, streams):
                with torch.cuda.stream(stream):
                    found.append(layer(x)[0])
        torch.cuda.synchronize()
    for states, first in zip(found, wanted):
        assert torch.equal(states, first)


@families
def test_a_plan_serves_any_rows(structure, hidden):
    layer = build(structure, None, hidden, 64, CUDA)
    layer.backend = "hopper"
    with torch.no_grad(), matmul_precision("high"):
        x = torch.randn(16, 40, 64, device=CUDA)
        out, _ = layer(x)
        for rows in (1, 8, 17):
            assert distance(layer(x[:, :rows])[0], out[:, :rows]) <= 2e-4


@pytest.mark.parametrize("rows", [8, 70])
@pytest.mark.parametrize("recipe", [None, "int8_state16"])
@families
def test_cuda_graphs(structure, hidden, recipe, rows):
    layer = build(structure, recipe, hidden, 64, CUDA)
    layer.backend = "hopper"
    x, new = torch.randn(2, 32, rows, 64, device=CUDA)

    def step():
        layer.zero_grad(set_to_none=True)
        out, last = layer(x)
        (out.sum() + last.sum()).backward()
        with torch.no_grad():
            return out, layer(x)[0]

    with matmul_precision("high"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trained, inferred = step()
        captured = {key: parameter.grad for key, parameter in layer.named_parameters()}
        x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        results = [trained.clone(), inferred.clone(), *(value.clone() for value in captured.values())]
        eager = [*step(), *(parameter.grad for parameter in layer.parameters())]
    for found, wanted in zip(results, eager):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "count, recipe, precision, reason",
    [
        (1, None, "highest", "as exact as fp32"),
        (8, None, "highest", "as exact as fp32"),
        (4, "int4_per_group_64", "high", "2 scales in each row"),
        (1, None, "high", "at most 1024 channels"),
        (5, None, "high", "160 programs at once"),
    ],
)
def test_what_is_refused_is_served_by_the_portable_tier(count, recipe, precision, reason):
    hidden = {"at most 1024 channels": 1040, "160 programs at once": 5 * 1024}.get(reason, 512)
    layer = build(blocks(count), recipe, hidden, 64, CUDA)
    x = torch.randn(4, 3, 64, device=CUDA)
    with matmul_precision(precision):
        for context in (torch.no_grad, torch.enable_grad):
            layer.backend = "auto"
            with context():
                layer(x)
            assert layer.last_path.startswith("triton (hopper: ") and reason in layer.last_path
        layer.backend = "hopper"
        with pytest.raises(RuntimeError, match=reason):
            layer(x)


def test_forced_triton_is_the_portable_tier():
    layer = build(blocks(8), None, 512, 64, CUDA)
    layer.backend = "triton"
    with matmul_precision("high"):
        layer(torch.randn(4, 3, 64, device=CUDA))
    assert layer.last_path == "triton (forced)"
    assert choose(Case(2, 2, 8, 64).inputs("dense", CUDA))[0] == "block_diagonal"
