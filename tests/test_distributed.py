"""Two processes, on gloo and on two GPUs: what ranks must agree on, DDP, FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import features

from gruqat_hf import GruQatForSequenceClassification

pytestmark = pytest.mark.hf

WORLD = 2
WORKER = Path(__file__).parent / "distributed_worker.py"


def skip_without_gpus() -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs, and this machine has {torch.cuda.device_count()}: NOT TESTED here")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ran(request, tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """What each rank's scenarios gave: one start of the processes for all tests, since that is what takes the time."""
    if request.param == "nccl":
        skip_without_gpus()
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(WORKER.parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(WORLD), folder, request.param],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    files = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    assert all(file.exists() for file in files), "\n".join(errors)[-4000:]
    return [json.loads(file.read_text()) for file in files], folder


@pytest.mark.parametrize(
    "scenario",
    [
        "ddp",
        "ddp_without_buffer_broadcast",
        "gradient_checkpointing",
        "ranges_are_those_of_all_ranks",
        "uneven_calibration",
        "metrics",
    ],
)
def test_ranks_agree(ran, scenario):
    for rank, results in enumerate(ran[0]):
        told = results.get(scenario, "not reached")
        assert isinstance(told, list) and all(told), f"rank {rank}: {told}"


def test_what_one_rank_does_alone_waits_for_nobody(ran):
    assert [results.get("one_rank_alone") for results in ran[0]] == [True, True]


def test_fsdp2_trains_as_ddp_and_saves_a_checkpoint_that_loads(ran):
    results, folder = ran
    for result in results:
        assert isinstance(result.get("fsdp2"), dict), result.get("fsdp2")
        assert result["fsdp2"]["different_from_ddp"] < 1e-5
        assert result["fsdp2"]["range"] == results[0]["fsdp2"]["range"] > 0  # of a scale that is spread over the ranks
    loaded = GruQatForSequenceClassification.from_pretrained(folder / "fsdp2")
    with torch.no_grad():
        assert torch.equal(loaded(inputs_embeds=features()).logits, torch.load(folder / "fsdp2.pt"))
        frozen = loaded.freeze()(inputs_embeds=features()).logits
    assert torch.equal(frozen, torch.load(folder / "fsdp2.pt"))


def test_fsdp2_refuses_learned_scales_that_have_seen_nothing(ran):
    for result in ran[0]:
        assert "calibrate(loader) before fully_shard()" in result["fsdp2_needs_scales_to_start_from"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)],
        # --multi_gpu is what makes it start processes: with its --cpu, --num_processes only tells mpirun how many.
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(WORLD), "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate launch"],
)
@pytest.mark.parametrize("device", ["--use_cpu", pytest.param("", marks=pytest.mark.gpu)], ids=["gloo", "nccl"])
def test_the_script_under(tmp_path, launcher, device):
    """Through transformers' Trainer and accelerate, started as a user does; --use_cpu makes it gloo."""
    pytest.importorskip("sklearn")
    if not device:
        skip_without_gpus()
    arguments = (
        f"{device} --disable_tqdm true --hidden_size 16 --max_steps 6 --qat_max_steps 5 --save_steps 4 --calibration_batches 2"
    )
    script = WORKER.parent.parent / "scripts" / "train_qat.py"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script), "--output_dir", str(tmp_path), *arguments.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training"]["processes"] == WORLD
    assert all(results["bit_identical"].values())
