"""What a trainer uploads: the real client, a server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_client import HubClient, RemoteError
from hub_server import HubServer
from huggingface_hub import ModelCard

pytestmark = pytest.mark.hf

ROOT = Path(__file__).resolve().parent.parent

PRELUDE = """
import logging, torch
torch.set_num_threads(1)
from hub_client import fingerprint
from pathlib import Path
from training_helpers import qat, trainer_of
from transformers import AutoModelForSequenceClassification as Auto, Trainer, TrainerCallback
from gruqat_hf.training import QATCallback, QATTrainer

def load(repo, **options):
    import tempfile
    return fingerprint(Auto.from_pretrained(repo, cache_dir=tempfile.mkdtemp(), **options))
"""

FILES = {"README.md", "config.json", "model.safetensors", "modeling_gruqat.py", "training_args.bin"}


@pytest.fixture(scope="module")
def _server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(_server, tmp_path_factory):
    client = HubClient(_server.url, tmp_path_factory.mktemp("client") / "home", PRELUDE, HF_TOKEN="hf_write")
    yield client
    client.close()


@pytest.fixture
def server(_server):
    _server.faults = []
    _server.log.clear()
    return _server


def card_of(server: HubServer, repo: str, revision: str = "main") -> ModelCard:
    return ModelCard(server.repos[repo].files(revision)["README.md"].decode())


def is_ours(card: ModelCard, repo: str) -> bool:
    return f'from_pretrained("{repo}"' in card.text and "How to load" in card.text and "gruqat" in card.data.tags


def results(tmp_path: Path) -> str:
    data: dict[str, Any] = {"format": 1, "task": "sequence-classification", "dataset": {"name": "Some rows", "split": "test"}}
    data["metrics"] = [{"type": "accuracy", "values": {"frozen": 0.75}}]
    (tmp_path / "results.json").write_text(json.dumps(data))
    return str(tmp_path / "results.json")


class TestPushToHub:
    def test_after_a_training(self, server, client, tmp_path):
        code = """
        trainer = trainer_of(qat(), out, [QATCallback()], max_steps=2, save_strategy="steps", save_steps=1)
        trainer.train()
        (Path(out) / "_private").write_text("x")
        metadata = {"tags": "extra", "license": "mit", "language": "en", "dataset_tags": "some/rows", "model_name": "other"}
        commit = trainer.push_to_hub(results=results, private=True, **metadata)
        result = [commit.oid, trainer.hub_model_id, fingerprint(trainer.model), load(repo)]
        """
        names = {"out": str(tmp_path / "trained"), "results": results(tmp_path), "repo": "user/trained"}
        oid, repo, sent, loaded = client.run(code, **names)
        assert sent == loaded and repo == "user/trained" and server.repos[repo].private
        assert server.repos[repo].branches["main"] == oid and len(server.repos[repo].commits) == 2
        assert server.repos[repo].files().keys() == FILES | {"results.json", ".gitattributes"}
        card = card_of(server, repo)
        assert is_ours(card, repo) and card.data.eval_results[0].metric_value == 0.75
        assert {"extra", "frozen"} <= set(card.data.tags)
        assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["some/rows"])

    def test_in_the_background_and_again(self, server, client, tmp_path):
        code = """
        trainer = trainer_of(qat(), out, [QATCallback(freeze_at_end=False)], max_steps=1, hub_model_id=repo)
        trainer.train()
        job = trainer.push_to_hub(blocking=False, revision="v1")
        trainer.model.freeze()
        second = trainer.push_to_hub("again", results=None)
        result = [job.result().oid, second.oid, load(repo, revision="v1"), load(repo), fingerprint(trainer.model)]
        """
        repo = "user/background"
        first, second, qat, frozen, wanted = client.run(code, out=str(tmp_path / "out"), repo=repo)
        assert server.repos[repo].branches == {"main": second, "v1": first}
        assert frozen == wanted != qat
        assert "qat" in card_of(server, repo, "v1").data.tags and "frozen" in card_of(server, repo).data.tags

    def test_a_card_that_a_person_wrote_stays(self, server, client, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
        code = """
        trainer = trainer_of(qat(), out, [QATCallback()], max_steps=1, hub_model_id=repo)
        trainer.train()
        trainer.push_to_hub(language="en")
        """
        client.run(code, out=str(tmp_path / "out"), repo="user/written")
        assert server.repos["user/written"].files()["README.md"].decode() == "---\nlicense: mit\n---\n# By hand\n"

    def test_replaces_the_card_of_a_plain_trainer(self, server, client, tmp_path):
        code = """
        for cls in (Trainer, QATTrainer):
            trainer = trainer_of(qat(), out, [QATCallback()], cls=cls, max_steps=1, hub_model_id=repo)
            trainer.train()
            trainer.push_to_hub()
        result = [fingerprint(trainer.model), load(repo)]
        """
        sent, loaded = client.run(code, out=str(tmp_path / "out"), repo="user/plain")
        first = list(server.repos["user/plain"].commits.values())[1]["README.md"].decode()
        assert "Trainer had access to" in first  # what is told in README; else this test is in vain
        assert sent == loaded and is_ours(card_of(server, "user/plain"), "user/plain")

    def test_saving_with_push_to_hub(self, server, client, tmp_path):
        code = """
        trainer = trainer_of(qat(), out, [QATCallback()], max_steps=1, push_to_hub=True, hub_strategy="end", hub_model_id=repo)
        trainer.train()
        trainer.save_model()
        result = [fingerprint(trainer.model), load(repo)]
        """
        sent, loaded = client.run(code, out=str(tmp_path / "out"), repo="user/saved")
        assert sent == loaded and len(server.repos["user/saved"].commits) == 2

    def test_refusals_are_those_of_the_hub(self, server, client, tmp_path):
        code = """
        trainer = trainer_of(qat(), out, [QATCallback()], max_steps=1, hub_model_id=repo)
        trainer.train()
        trainer.push_to_hub(**options)
        """
        names = {"out": str(tmp_path / "out"), "repo": "user/refused"}
        with pytest.raises(RemoteError, match="no write access"):
            client.run(code, **names, options={"token": "hf_read"})
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(RemoteError, match="format must be 1"):
            client.run(code, **names, options={"results": str(tmp_path / "results.json")})
        assert "user/refused" not in server.repos

    def test_a_model_of_another_sort_is_left_to_trainer(self, server, client, tmp_path):
        code = """
        from transformers import GPT2Config, GPT2ForSequenceClassification
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, pad_token_id=0))
        trainer_of(model, out, hub_model_id=repo).push_to_hub()
        """
        client.run(code, out=str(tmp_path / "out"), repo="user/other")
        assert "Trainer had access to" in server.repos["user/other"].files()["README.md"].decode()


class TestDuringATraining:
    """hub_strategy: every commit that the repository ever had loads, and has the model's card."""

    CODE = """
    class Wait(TrainerCallback):
        "Lets each upload come to its end, for the sake of a known number of them."
        def on_save(self, args, state, control, **kwargs):
            trainer._finish_current_push()

    callbacks = [QATCallback(freeze_at_end=False)] + ([Wait()] if waits else [])
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "push_to_hub": True, "hub_model_id": repo, **settings}
    trainer = trainer_of(qat(), out, callbacks, **settings)
    trainer.train()
    result = fingerprint(trainer.model)
    """

    def commits(self, server: HubServer, repo: str) -> list[str]:
        return [sha for sha, files in server.repos[repo].commits.items() if "config.json" in files]

    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
    def test_every_commit_loads(self, server, client, tmp_path, strategy):
        repo, out = f"user/{strategy}", tmp_path / "out"
        (out / "runs").mkdir(parents=True)
        (out / "runs" / "events").write_text("of TensorBoard")
        settings = {"hub_strategy": strategy, "save_total_limit": 1}
        sent = client.run(self.CODE, out=str(out), repo=repo, settings=settings, waits=True)
        commits = self.commits(server, repo)
        assert len(commits) == 3
        code = "result = [load(repo, revision=sha) for sha in commits]"
        loaded = client.run(code, repo=repo, commits=commits)
        assert len(set(loaded)) == 3 and loaded[-1] == sent
        for sha in commits:
            files = server.repos[repo].files(sha)
            at_root = {path for path in files if "/" not in path}
            assert at_root == FILES | {".gitattributes"} and files["runs/events"] == b"of TensorBoard"
            assert is_ours(card_of(server, repo, sha), repo)
        folders = {path.partition("/")[0] for path in server.repos[repo].files() if path.endswith("/optimizer.pt")}
        steps = {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
        assert folders == {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": steps}[strategy]

    def test_the_last_checkpoint_resumes(self, server, client, tmp_path):
        code = """
        from huggingface_hub import snapshot_download
        found = snapshot_download("user/resumed", local_dir=target)
        trainer = trainer_of(qat(), target + "/out", [QATCallback(freeze_at_end=False)], max_steps=7)
        trainer.train(resume_from_checkpoint=found + "/last-checkpoint")
        result = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
        """
        settings = {"hub_strategy": "checkpoint"}
        client.run(self.CODE, out=str(tmp_path / "out"), repo="user/resumed", settings=settings, waits=True)
        assert client.run(code, target=str(tmp_path / "target")) == [2, 4, 6]  # those of the first part, which ended at step 6

    def test_the_training_overtakes_its_uploads(self, server, client, tmp_path):
        """It writes, and deletes, checkpoints while earlier ones are uploaded."""
        settings = {"hub_always_push": True, "save_steps": 1, "save_total_limit": 1}
        repo = "user/overtaken"
        sent = client.run(self.CODE, out=str(tmp_path / "out"), repo=repo, settings=settings, waits=False)
        commits = self.commits(server, repo)
        assert len(commits) == 6
        loaded = client.run("result = [load(repo, revision=sha) for sha in commits]", repo=repo, commits=commits)
        assert len(set(loaded)) == 6 and loaded[-1] == sent

    def test_an_upload_that_fails_does_not_end_the_training(self, server, client, tmp_path):
        server.fail("POST", "/commit/", 503, times=1000)
        repo = "user/failing"
        listen = """
        told, handler = [], logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())
        logging.getLogger("gruqat_hf").addHandler(handler)
        """
        client.run(listen)
        client.run(self.CODE, out=str(tmp_path / "out"), repo=repo, settings={}, waits=True)
        told = client.run("logging.getLogger('gruqat_hf').removeHandler(handler)\nresult = told")
        assert any("checkpoint-2 was not uploaded, the training goes on: " in message for message in told), told
        assert not self.commits(server, repo)


@pytest.mark.slow
def test_the_script_publishes_the_integer_model(server, client, tmp_path):
    pytest.importorskip("sklearn")
    arguments = (
        "--use_cpu --disable_tqdm true --hidden_size 16 --max_steps 4 --qat_max_steps 4 --save_steps 2 --calibration_batches 2 "
        "--push_to_hub --hub_token hf_write --hub_private_repo true"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_qat.py", "--output_dir", tmp_path / "digits-int8", *arguments.split()],
        env={**kept, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    repo = "user/digits-int8"
    assert [name for name in server.repos if "digits" in name or "qat" in name] == [repo] and server.repos[repo].private
    assert card_of(server, repo).data.eval_results[0].metric_type == "accuracy"
    code = "result = load(repo) == fingerprint(Auto.from_pretrained(folder))"
    assert client.run(code, repo=repo, folder=str(tmp_path / "digits-int8" / "frozen"))
