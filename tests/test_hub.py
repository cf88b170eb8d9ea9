"""Publishing and loading through a Hub: the real client, a server on 127.0.0.1, and what can go wrong in between."""

from __future__ import annotations

import json

import pytest
from hub_client import HubClient, RemoteError, fingerprint
from hub_server import DROP, LOSE, HubServer
from huggingface_hub import ModelCard
from model_helpers import KINDS, in_state, small_model

pytestmark = pytest.mark.hf

FILES = {"README.md", "config.json", "model.safetensors", "modeling_gruqat.py"}

PRELUDE = """
import torch
torch.set_num_threads(1)
import gruqat_hf
from hub_client import fingerprint
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification as Auto
"""


@pytest.fixture(scope="module")
def _server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("client") / "home"


@pytest.fixture(scope="module")
def client(_server, home):
    client = HubClient(_server.url, home, PRELUDE, HF_TOKEN="hf_write")
    yield client
    client.close()


@pytest.fixture
def server(_server):
    """With its settings as they were; repositories stay, so every test has names of its own."""
    _server.uploads, _server.faults = "regular", []
    _server.log.clear()
    return _server


@pytest.fixture
def checkpoint(tmp_path):
    """Saves models; gives their folder and what they are made of."""

    def save(state="frozen", seed=0, **fields):
        model = in_state(small_model(seed, structure_hidden=KINDS["monarch"], **fields), state)
        folder = tmp_path / f"{state}-{seed}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return str(folder), fingerprint(model)

    return save


PUSH = "result = Auto.from_pretrained(folder).push_to_hub(repo, **options).oid"
LOAD = "result = fingerprint(Auto.from_pretrained(repo, **options))"
# A cache of its own for each load, so that nothing comes from an earlier one.
FRESH = "import tempfile; options = {**options, 'cache_dir': tempfile.mkdtemp()}\n"


def push(client, folder, repo, **options):
    return client.run(PUSH, folder=folder, repo=repo, options=options)


def load(client, repo, **options):
    return client.run(FRESH + LOAD, repo=repo, options=options)


@pytest.mark.parametrize("state", ["float", "qat", "frozen"])
def test_round_trip(server, client, checkpoint, state):
    folder, wanted = checkpoint(state)
    repo = f"user/gru-monarch-{state}"
    oid = push(client, folder, repo)
    files = server.repos[repo].files()
    assert files.keys() == FILES | {".gitattributes"}
    assert len(server.repos[repo].commits) == 2 and server.repos[repo].branches["main"] == oid
    assert load(client, repo) == wanted
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "tabular-classification"
    assert f'from_pretrained("{repo}"' in card.text
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForSequenceClassification"] == "modeling_gruqat.GruQatForSequenceClassification"


def test_loading_from_the_hub_and_saving_leaves_no_reference_to_it(server, client, checkpoint, tmp_path):
    folder, wanted = checkpoint()
    push(client, folder, "user/again")
    code = """
    model = Auto.from_pretrained("user/again", trust_remote_code=True)
    model.save_pretrained(target)
    result = fingerprint(Auto.from_pretrained(target))
    """
    assert client.run(code, target=str(tmp_path / "target")) == wanted
    assert "--" not in (tmp_path / "target" / "config.json").read_text()


@pytest.mark.parametrize("uploads", ["basic", "multipart"])
def test_large_files(server, client, checkpoint, uploads):
    server.uploads = uploads
    folder, wanted = checkpoint(seed={"basic": 1, "multipart": 2}[uploads])
    repo = f"user/large-{uploads}"
    push(client, folder, repo)
    assert server.repos[repo].large == {"model.safetensors"}
    pieces = server.requests("PUT", r"^/storage/")
    assert pieces == 1 if uploads == "basic" else pieces > 1
    assert load(client, repo) == wanted and server.requests("GET", "^/cdn/") == 1


def test_sharded(server, client, checkpoint):
    server.uploads = "basic"
    folder, wanted = checkpoint(seed=3)
    push(client, folder, "user/sharded", max_shard_size="2KB")
    files = server.repos["user/sharded"].files()
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert load(client, "user/sharded") == wanted

    # Whole, then sharded, then whole again: what is left of the one before must not be loaded.
    for seed, options in ((4, {}), (5, {"max_shard_size": "2KB"}), (6, {})):
        folder, wanted = checkpoint(seed=seed)
        push(client, folder, "user/sharded", **options)
        files = server.repos["user/sharded"].files()
        assert ("model.safetensors" in files) != ("model.safetensors.index.json" in files)
        assert load(client, "user/sharded") == wanted


def test_revisions(server, client, checkpoint):
    old_folder, old = checkpoint(seed=1)
    new_folder, new = checkpoint(seed=2)
    first = push(client, old_folder, "user/revisions")
    push(client, new_folder, "user/revisions")
    third = push(client, old_folder, "user/revisions", revision="v1")
    assert server.repos["user/revisions"].branches["v1"] == third
    assert load(client, "user/revisions") == new
    for revision in (first, "v1", third):
        assert load(client, "user/revisions", revision=revision) == old
    with pytest.raises(RemoteError, match="not a valid git identifier"):
        load(client, "user/revisions", revision="no-such-branch")


def test_pull_request(server, client, checkpoint):
    (old_folder, old), (new_folder, _) = checkpoint(seed=1), checkpoint(seed=2)
    push(client, old_folder, "user/pr")
    client.run("result = Auto.from_pretrained(folder).push_to_hub('user/pr', create_pr=True).pr_url", folder=new_folder)
    assert load(client, "user/pr") == old


def test_snapshot(server, client, checkpoint, tmp_path):
    folder, wanted = checkpoint(seed=7)
    push(client, folder, "user/snapshot")
    code = "result = fingerprint(Auto.from_pretrained(snapshot_download('user/snapshot', local_dir=target)))"
    assert client.run(code, target=str(tmp_path / "copy")) == wanted
    assert FILES <= {path.name for path in (tmp_path / "copy").iterdir()}


def test_a_new_machine_then_offline(server, client, checkpoint, tmp_path):
    """Without import and without anything cached; then with what that left in the cache and no Hub at all."""
    folder, wanted = checkpoint(seed=8)
    push(client, folder, "user/offline")
    code = """
    import sys
    from transformers import AutoModelForSequenceClassification as Auto
    imported_before = "gruqat_hf" in sys.modules
    model = Auto.from_pretrained("user/offline", trust_remote_code=True)
    from hub_client import fingerprint
    result = [imported_before, fingerprint(model)]
    """
    offline = {"HF_HUB_OFFLINE": "1"}
    for url, environment in ((server.url, {}), ("http://127.0.0.1:9", offline)):
        machine = HubClient(url, tmp_path / "machine", **environment)
        try:
            assert machine.run(code) == [False, wanted]
            if environment:
                with pytest.raises(RemoteError, match="user/sharded|offline|cached"):
                    machine.run("Auto.from_pretrained('user/sharded')")
        finally:
            machine.close()


class TestAccess:
    def test_private(self, server, client, checkpoint):
        folder, wanted = checkpoint()
        push(client, folder, "user/private", private=True)
        assert server.repos["user/private"].private
        assert load(client, "user/private", token="hf_read") == wanted
        with pytest.raises(RemoteError, match=r"private.*token|token.*private") as refused:
            load(client, "user/private", token=False)
        assert "OSError" in refused.value.kinds
        for token in ("hf_expired", "hf_unknown"):
            with pytest.raises(RemoteError, match="(?i)token|credentials"):
                load(client, "user/private", token=token)

    def test_pushing_without_the_right(self, server, client, checkpoint):
        (folder, wanted), (other, _) = checkpoint(), checkpoint(seed=9)
        push(client, folder, "user/mine")
        before = dict(server.repos["user/mine"].commits)
        for token, message in (("hf_expired", "expired"), ("hf_read", "no write access"), ("hf_unknown", "Invalid credentials")):
            with pytest.raises(RemoteError, match=message) as refused:
                push(client, other, "user/mine", token=token)
            assert "HfHubHTTPError" in refused.value.kinds
        assert server.repos["user/mine"].commits == before and load(client, "user/mine") == wanted

    def test_a_token_that_expires_during_the_upload(self, server, client, checkpoint):
        server.uploads = "basic"
        (folder, wanted), (other, _) = checkpoint(), checkpoint(seed=10)
        push(client, folder, "user/expires")
        server.fail("POST", "/commit/", 401)
        with pytest.raises(RemoteError, match="401"):
            push(client, other, "user/expires")
        assert load(client, "user/expires") == wanted


class TestFaultsWhilePublishing:
    """The repository has all of the new checkpoint or is as it was; never a part of it."""

    @pytest.mark.parametrize("uploads", ["basic", "multipart"])
    @pytest.mark.parametrize("fault", [503, DROP])
    def test_one_failure_of_a_large_file_is_retried(self, server, client, checkpoint, uploads, fault):
        server.uploads = uploads
        folder, wanted = checkpoint(seed=20 + 2 * (uploads == "basic") + (fault == DROP))
        server.fail("PUT", "/storage/", fault)
        repo = f"user/retried-{uploads}-{fault}"
        push(client, folder, repo)
        assert load(client, repo) == wanted

    def test_lasting_failures(self, server, client, checkpoint):
        server.uploads = "basic"
        (folder, wanted), (other, changed) = checkpoint(seed=30), checkpoint(seed=31)
        push(client, folder, "user/lasting", max_shard_size="4KB")
        before = dict(server.repos["user/lasting"].commits)
        for method, path, fault in (
            ("POST", "/api/repos/create", 503),
            ("GET", "/api/models/user/lasting$", 503),
            ("HEAD", "README.md", 503),  # whose absence would be taken for permission to write another
            ("POST", "/preupload/", 503),
            ("POST", "/lfs/objects/batch", 503),
            ("PUT", "/storage/", 503),
            ("PUT", "/storage/", DROP),
            ("POST", "/commit/", 503),
            ("POST", "/commit/", DROP),
        ):
            server.known.clear()  # so that everything has to be uploaded
            server.faults.clear()
            server.fail(method, path, fault, times=1000)
            # The status, or what happened and what to do about it.
            with pytest.raises(RemoteError, match=r"503|(?s:user/lasting failed: .+push_to_hub\(\) again)"):
                push(client, other, "user/lasting", max_shard_size="4KB")
            assert server.repos["user/lasting"].commits == before, (method, path, fault)
        server.faults.clear()
        assert load(client, "user/lasting") == wanted
        push(client, other, "user/lasting")  # trying again simply works
        assert load(client, "user/lasting") == changed

    def test_of_two_at_once_one_is_refused(self, server, client, checkpoint):
        (folder, wanted), (other, _) = checkpoint(seed=32), checkpoint(seed=33)
        push(client, folder, "user/race")
        code = """
        create_commit = HfApi.create_commit
        def late(self, repo_id, operations, **options):
            HfApi.create_commit = create_commit
            Auto.from_pretrained(first).push_to_hub(repo_id, max_shard_size="2KB")
            return create_commit(self, repo_id, operations, **options)
        HfApi.create_commit = late
        Auto.from_pretrained(second).push_to_hub("user/race")
        """
        with pytest.raises(RemoteError, match="A commit has happened since"):
            client.run(code, first=folder, second=other)
        assert load(client, "user/race") == wanted

    def test_of_a_first_upload_nothing_loads(self, server, client, checkpoint):
        server.fail("POST", "/commit/", DROP)
        with pytest.raises(RemoteError):
            push(client, checkpoint()[0], "user/first")
        with pytest.raises(RemoteError, match="config.json|does not appear|model_type"):
            load(client, "user/first")

    def test_an_answer_that_is_lost(self, server, client, checkpoint):
        folder, wanted = checkpoint(seed=40)
        server.fail("POST", "/commit/", LOSE)
        with pytest.raises(RemoteError, match="all of the new files or none") as failed:
            push(client, folder, "user/lost")
        assert "ConnectionError" in failed.value.kinds
        assert load(client, "user/lost") == wanted
        push(client, folder, "user/lost")
        assert load(client, "user/lost") == wanted


class TestFaultsWhileLoading:
    @pytest.mark.parametrize("fault", [DROP, 503])
    @pytest.mark.parametrize("uploads", ["regular", "basic"])
    def test_one_failure(self, server, client, checkpoint, uploads, fault):
        server.uploads = uploads
        folder, wanted = checkpoint(seed=50)
        repo = f"user/flaky-{uploads}-{fault}"
        push(client, folder, repo)
        path = "^/cdn/" if uploads == "basic" else "/resolve/.*model.safetensors$"
        server.fail("GET", path, fault)
        if fault == DROP:
            # Taken up again where it broke.
            assert load(client, repo) == wanted and server.requests("GET", path) == 2
            return
        options = {"cache_dir": client.run("import tempfile; result = tempfile.mkdtemp()")}
        with pytest.raises(RemoteError, match="503|model.safetensors"):
            client.run(LOAD, repo=repo, options=options)
        assert client.run(LOAD, repo=repo, options=options) == wanted

    def test_lasting_failures_leave_nothing_that_loads(self, server, client, checkpoint):
        folder, wanted = checkpoint(seed=51)
        push(client, folder, "user/broken", max_shard_size="2KB")
        shards = sorted(path for path in server.repos["user/broken"].files() if path.endswith(".safetensors"))
        options = {"cache_dir": client.run("import tempfile; result = tempfile.mkdtemp()")}
        server.fail("GET", f"{shards[-1]}$", DROP, times=1000)
        with pytest.raises(RemoteError):
            client.run(LOAD, repo="user/broken", options=options)
        server.faults = []
        # Some shards are in the cache; without the Hub that is not enough, and with it the rest is fetched.
        with pytest.raises(RemoteError, match="(?i)shard|safetensors|offline|cache|connection") as refused:
            client.run(LOAD, repo="user/broken", options={**options, "local_files_only": True})
        assert "OSError" in refused.value.kinds
        assert client.run(LOAD, repo="user/broken", options=options) == wanted

    def test_a_hub_that_is_down_after_one_load(self, server, client, checkpoint):
        folder, wanted = checkpoint(seed=52)
        push(client, folder, "user/down")
        options = {"cache_dir": client.run("import tempfile; result = tempfile.mkdtemp()")}
        assert client.run(LOAD, repo="user/down", options=options) == wanted
        for method in ("GET", "HEAD"):
            server.fail(method, "", 503, times=1000)
        assert client.run(LOAD, repo="user/down", options=options) == wanted


class TestCards:
    def test_results_and_plots_go_along(self, server, client, checkpoint, tmp_path):
        folder, wanted = checkpoint()
        (tmp_path / "loss.png").write_bytes(b"image")
        results = {"format": 1, "task": "sequence-classification", "dataset": {"name": "Some rows", "split": "test"}}
        results["metrics"] = [{"type": "accuracy", "values": {"float": 0.5, "frozen": 0.75}}]
        results["plots"] = [{"path": "loss.png", "caption": "Loss"}]
        (tmp_path / "results.json").write_text(json.dumps(results))
        push(client, folder, "user/results", results=str(tmp_path / "results.json"), tags=["extra"])
        files = server.repos["user/results"].files()
        assert files.keys() == FILES | {".gitattributes", "results.json", "loss.png"} and files["loss.png"] == b"image"
        card = ModelCard(files["README.md"].decode())
        assert card.data.eval_results[0].metric_value == 0.75 and "extra" in card.data.tags and "(loss.png)" in card.text
        assert load(client, "user/results") == wanted

    def test_what_a_person_wrote_stays(self, server, client, checkpoint):
        folder, _ = checkpoint()
        push(client, folder, "user/written")
        repo = server.repos["user/written"]
        written = b"---\nlicense: mit\ntags:\n- mine\n---\n# By hand\n"
        repo.commit("main", {**repo.files(), "README.md": written})
        push(client, folder, "user/written", tags=["extra"])
        card = ModelCard(repo.files()["README.md"].decode())
        assert "# By hand" in card.text and card.data.license == "mit"
        assert {"mine", "gruqat", "extra"} <= set(card.data.tags)
        broken = b"---\ntags: [\n---\n# By hand, not well\n"
        repo.commit("main", {**repo.files(), "README.md": broken})
        with pytest.raises(RemoteError):
            push(client, folder, "user/written")  # the Hub refuses it, but it is not lost
        assert repo.files()["README.md"] == broken

    def test_an_empty_card_of_transformers_is_replaced(self, server, client, checkpoint):
        folder, _ = checkpoint()
        client.run("AutoConfig.from_pretrained(folder).push_to_hub('user/empty')", folder=folder)
        assert "More Information Needed" in server.repos["user/empty"].files()["README.md"].decode()
        push(client, folder, "user/empty")
        assert "How to load" in server.repos["user/empty"].files()["README.md"].decode()

    def test_saving_with_push_to_hub(self, server, client, checkpoint, tmp_path):
        folder, wanted = checkpoint()
        code = "Auto.from_pretrained(folder).save_pretrained(target, push_to_hub=True, repo_id='user/saved')"
        client.run(code, folder=folder, target=str(tmp_path / "target"))
        assert server.repos["user/saved"].files().keys() == FILES | {".gitattributes"}
        assert load(client, "user/saved") == wanted
        assert {path.name for path in (tmp_path / "target").iterdir()} == FILES
