"""The promise: a quantized model gives the same bits on every path.

QAT in eval mode = frozen = saved and loaded in a new process, for any split of the batch and, in one direction, any split of the
sequence into chunks.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gruqat_hf import GruQatConfig, GruQatModel, StructureConfig

STRUCTURES = {
    "dense": StructureConfig("dense"),
    "diagonal": StructureConfig("diagonal"),
    "blockdiag": StructureConfig("blockdiag", nblocks=2),
    "monarch": StructureConfig("monarch", nblocks=4),
    "butterfly": StructureConfig("butterfly"),
    "circulant": StructureConfig("circulant"),
    "ldr": StructureConfig("ldr", rank=2),
}
PRESETS = ["int8_per_channel", "int8_state16", "int4_per_group_64"]
CASES = list(itertools.product(STRUCTURES, PRESETS, [1, 2], [False, True]))
HIDDEN, INPUTS, STEPS, BATCH = 32, 12, 9, 5


def build(structure: str, preset: str, layers: int, bidirectional: bool) -> GruQatModel:
    config = GruQatConfig(
        input_size=INPUTS,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        bidirectional=bidirectional,
        structure_hidden=STRUCTURES[structure],
    )
    model = GruQatModel(config).prepare_qat(preset).train()
    for _ in range(2):  # as training does: observers see quantized activations
        model(inputs_embeds=torch.randn(STEPS, BATCH, INPUTS) * 2)
    return model.eval()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every case saved, and run in one new process: its inputs, the outputs here, and the outputs there."""
    folder = tmp_path_factory.mktemp("contract")
    torch.manual_seed(0)
    results = {}
    for index, case in enumerate(CASES):
        model = build(*case)
        x = torch.randn(BATCH, STEPS, INPUTS) * 2
        with torch.no_grad():
            qat = model(inputs_embeds=x).last_hidden_state
        frozen = copy.deepcopy(model).freeze()
        frozen.save_pretrained(folder / str(index))
        save_file({"x": x}, folder / f"x{index}.safetensors")
        results[case] = (model, frozen, x, qat)
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel
import gruqat_hf
folder, cases = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(2)
for index in range(cases):
    model = AutoModel.from_pretrained(folder / str(index))
    with torch.no_grad():
        out = model(inputs_embeds=load_file(folder / f"x{index}.safetensors")["x"]).last_hidden_state
    save_file({"out": out.contiguous()}, folder / f"out{index}.safetensors")
"""
    subprocess.run([sys.executable, "-c", script, str(folder), str(len(CASES))], check=True, timeout=600)
    return {
        case: (*result, load_file(folder / f"out{index}.safetensors")["out"])
        for index, (case, result) in enumerate(results.items())
    }


@pytest.mark.hf
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_same_bits_on_every_path(reloaded, case):
    model, frozen, x, qat, elsewhere = reloaded[case]
    bidirectional = case[3]
    with torch.no_grad():
        whole = frozen(inputs_embeds=x)
        assert torch.equal(whole.last_hidden_state, qat), "frozen differs from QAT in eval mode"
        assert torch.equal(elsewhere, qat), "reloaded in a new process differs"
        for split in (1, 3):
            parts = [m(inputs_embeds=part).last_hidden_state for m, part in ((model, x[:split]), (frozen, x[split:]))]
            assert torch.equal(torch.cat(parts), qat), "splitting the batch changes the output"
        if bidirectional:
            with pytest.raises(ValueError, match="bidirectional"):
                frozen(inputs_embeds=x, past_key_values=torch.zeros(2 * case[2], BATCH, HIDDEN))
            return
        for cuts in ((1, STEPS - 1), (4, 2, 3), (1,) * STEPS):
            cache, parts = None, []
            for part in x.split(cuts, dim=1):
                output = frozen(inputs_embeds=part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.last_hidden_state)
            assert torch.equal(torch.cat(parts, dim=1), qat), "cutting the sequence into chunks changes the output"


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    torch.manual_seed(1)
    model = build("dense", "int8_state16", 1, False).freeze()
    x = torch.randn(64, STEPS, INPUTS)
    before = torch.get_num_threads()
    with torch.no_grad():
        expected = model(inputs_embeds=x).last_hidden_state
        torch.set_num_threads(threads)
        try:
            assert torch.equal(model(inputs_embeds=x).last_hidden_state, expected)
        finally:
            torch.set_num_threads(before)


def test_long_rows_sum_exactly():
    """Beyond 1,040 products of 8-bit codes fp32 no longer holds every sum: pieces are added exactly."""
    from gruqat_hf import GRULayer

    size = 2600
    layer = GRULayer(size, 8, recipe="int8_state16")
    with torch.no_grad():
        layer.weight_input.structure.weight.uniform_(0.5, 1.0)  # of one sign, so that sums grow large
    x = torch.rand(3, 2, size) + 0.5
    layer.calibrate([x], progress=False).freeze()
    weights = layer.weight_input
    codes = layer.x.grid().codes(x).double()
    exact = torch.einsum("tbi,gi->tbg", codes, weights.blocks_codes.flatten(0, 2).double())
    assert exact.abs().max() > 2**24
    expected = exact.float() * (layer.x.scale * weights.blocks_scale.flatten()) + layer.bias_input
    product = layer._input_product(x, None).flatten(2)
    assert torch.equal(product, expected)
