"""What the processes of test_distributed.py run. Each scenario gives JSON types; rank 0 writes them all to a file.

python distributed_worker.py RANK WORLD FOLDER gloo|nccl
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_helpers import KINDS
from model_helpers import features as features_on_cpu
from model_helpers import small_model as model_on_cpu
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gruqat_hf import PRESETS, QuantizerConfig
from gruqat_hf.layers.lifecycle import fake_quantizers
from gruqat_hf.quantization.meter import SaturationMeter
from gruqat_hf.training import quantizer_metrics

#: With nccl the GPU whose number is the rank.
DEVICE = torch.device("cpu")
LSQ = QuantizerConfig(scheme="lsq", observer="minmax")
#: Every kind of observer, and learned scales on both sides of a product.
RECIPE = replace(
    PRESETS["int8_state16"],
    x=LSQ,
    gates=QuantizerConfig(observer="ema", granularity="gate"),
    mid_hidden=QuantizerConfig(observer="percentile"),
    mid_input=QuantizerConfig(observer="minmax", symmetric=False),
    weight_hidden=replace(LSQ, granularity="channel"),
    weight_input=QuantizerConfig(observer="ema", granularity="channel"),
    name="all_kinds",
)


def features(**shape: int) -> Tensor:
    return features_on_cpu(**shape).to(DEVICE)


def small_model(**fields: Any) -> Any:
    return model_on_cpu(**fields).to(DEVICE)


def qat_model(**fields: Any) -> Any:
    return small_model(structure_hidden=KINDS["monarch"], structure_input=KINDS["monarch"], **fields).prepare_qat(RECIPE).train()


def batch(rank: int, step: int, masked: bool = False) -> dict[str, Tensor]:
    """Ranks differ in values, batch size and length."""
    x = features(batch=3 + rank, steps=4 + 2 * rank, seed=10 * step + rank)
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=DEVICE)
    mask[0, 2:] = 0
    labels = (x.sum((1, 2)) > 0).long()
    return {"inputs_embeds": x, "attention_mask": torch.zeros_like(mask) if masked else mask, "labels": labels}


def same_on_all_ranks(model: nn.Module) -> bool:
    for tensor in [*model.parameters(), *model.buffers()]:
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, tensor.detach().cpu())
        if not all(torch.equal(seen[0], other) for other in seen[1:]):
            return False
    return True


def train(rank: int, model: Any, steps: int = 4, **ddp: Any) -> list[bool]:
    """Rounding from the second step on; each rank once sees padding only, one of them in the very first step. After each step:
    whether all ranks hold the same."""
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    same = []
    for step in range(steps):
        for quantizer in fake_quantizers(model):
            quantizer.fake_quant_enabled = step >= 1
        wrapped(**batch(rank, step, masked=step in (0, 2) and rank == step // 2)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        same.append(same_on_all_ranks(model))
    return same


def ddp(rank: int, folder: Path) -> Any:
    return train(rank, qat_model())


def ddp_without_buffer_broadcast(rank: int, folder: Path) -> Any:
    return train(rank, qat_model(), broadcast_buffers=False)


def gradient_checkpointing(rank: int, folder: Path) -> Any:
    plain, checkpointed = qat_model(), qat_model()
    checkpointed.gradient_checkpointing_enable()
    same = train(rank, plain, steps=2) + train(rank, checkpointed, steps=2)
    pairs = zip(plain.state_dict().values(), checkpointed.state_dict().values())
    return [*same, all(torch.equal(one, other) for one, other in pairs)]


def ranges_are_those_of_all_ranks(rank: int, folder: Path) -> Any:
    model = small_model().prepare_qat(replace(PRESETS["int8_state16"], x=QuantizerConfig(observer="minmax"))).train()
    x = features(seed=rank)
    model(inputs_embeds=x)
    layer = model.get_stack().layers[0][0]
    everything = torch.cat([features(seed=other) for other in range(dist.get_world_size())])
    return [
        layer.x.observer.min_val.item() == everything.min().item(),
        layer.x.observer.max_val.item() == everything.max().item(),
        everything.min() < x.min() or everything.max() > x.max() or rank == 0,
    ]


def uneven_calibration(rank: int, folder: Path) -> Any:
    model = qat_model()
    model.calibrate([features(seed=10 * i + rank) for i in range(4 - rank)], progress=False)
    return [same_on_all_ranks(model), int(model.get_stack().layers[0][0].gates.observer.count) == 3]


def one_rank_alone(rank: int, folder: Path) -> Any:
    """Nothing that a rank may do alone waits for the others."""
    if rank == 0:
        small_model().prepare_qat("int8_dynamic").freeze()(inputs_embeds=features())
        qat_model()
    dist.barrier()
    return True


def metrics(rank: int, folder: Path) -> Any:
    model = qat_model()
    model.calibrate([features(seed=1)], progress=False)
    layer = model.get_stack().layers[0][0]
    layer.x.meter, largest = SaturationMeter(), layer.x.scale.item() * 127
    model.eval()
    x = torch.zeros(2, 5, 8, device=DEVICE)
    x[0, 0, : 1 + rank] = 2 * largest
    model(inputs_embeds=x)
    told = quantizer_metrics(model)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, told)
    place = "qat/layers.0.0.x"
    return [seen[0] == seen[1], told[f"{place}/saturation"] == 3 / 160, abs(told[f"{place}/range"] / largest - 1) < 1e-6]


def fsdp2(rank: int, folder: Path) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = qat_model()
    model.calibrate([features(seed=1)], progress=False)
    reference = qat_model()
    reference.load_state_dict(model.state_dict())
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for layer in model.get_stack().flat_layers():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ddp_model = DistributedDataParallel(reference)
    losses = []
    for runs, parameters in ((model, model.parameters()), (ddp_model, reference.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for step in range(3):
            for quantizer in fake_quantizers(model):
                quantizer.meter = SaturationMeter()
            loss = runs(**batch(rank, step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    told = quantizer_metrics(model)
    model.eval()
    logits = model(inputs_embeds=features()).logits
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "fsdp2", state_dict=state_dict)
        torch.save(logits.detach().cpu(), folder / "fsdp2.pt")
    different = max(abs(one - other) for one, other in zip(losses[:3], losses[3:]))
    return {"different_from_ddp": different, "losses": losses, "range": told["qat/layers.0.0.x/range"]}


def fsdp2_needs_scales_to_start_from(rank: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = qat_model()
    fully_shard(model, mesh=init_device_mesh(DEVICE.type, (dist.get_world_size(),)))
    try:
        model(**batch(rank, 0))
    except RuntimeError as error:
        return str(error)
    return None


SCENARIOS = [
    ddp,
    ddp_without_buffer_broadcast,
    gradient_checkpointing,
    ranges_are_those_of_all_ranks,
    uneven_calibration,
    one_rank_alone,
    metrics,
    fsdp2,
    fsdp2_needs_scales_to_start_from,
]


def main() -> None:
    global DEVICE
    rank, world, folder, backend = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    if backend == "nccl":
        DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(DEVICE)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group(backend, store, datetime.timedelta(minutes=5), rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(rank, folder)
        except Exception:  # test_distributed.py fails with this text, and with every scenario that is missing after it
            results[scenario.__name__] = traceback.format_exc()
            break  # the ranks are no longer at the same place
    (folder / f"rank{rank}.json").write_text(json.dumps(results, default=bool))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
