"""Upload of a saved model."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from .card import FILE as CARD
from .card import is_generated

# What from_pretrained looks for, in this order: a leftover of another kind of save would be found first, or lead to old shards.
_WEIGHTS = re.compile(r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")


def publish(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload ``folder`` in one commit.

    (``HfApi.upload_folder`` may make several commits of an upload; a connection that broke between two of them would leave half a
    checkpoint.)

    Raises:
        ValueError: an id that no repository can have, or metadata of a card that the Hub refuses.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, naming its reason; no file of the repository has changed.
        ConnectionError: the connection broke, again and again.
    """
    api = HfApi(token=token, library_name="gruqat-hf")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        present = [file.rfilename for file in before.siblings or []]
        if CARD in present:
            _keep_written_card(api, folder, repo_id, before.sha)
        return api.create_commit(
            repo_id,
            _operations(folder, present),
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,  # what is deleted was decided on that; if somebody has uploaded since, the Hub refuses
        )
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:  # the HTTP library behind the client, and with it its errors, depends on the client's version
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        raise ConnectionError(
            f"uploading to {repo_id} failed: {error}{cause}\nThe repository has all of the new files or none; "
            "call push_to_hub() again when the connection is back"
        ) from error


def _operations(folder: Path, present: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add what is in ``folder``; delete weights of the repository that are not, and would be taken for the new ones."""
    ours = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    stale = [path for path in present if _WEIGHTS.fullmatch(path) and path not in ours]
    return [
        *(CommitOperationDelete(path_in_repo=path) for path in stale),
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in ours.items()),
    ]


def _keep_written_card(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> None:
    """Put the repository's own README.md, if a person wrote it, in the place of the generated one."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=temporary))
        written = path.read_bytes()
        if is_generated(written.decode("utf-8", errors="replace")):
            return
        tags = ModelCard.load(folder / CARD).data.tags or []
        try:
            card = ModelCard.load(path)
        except ValueError:  # metadata that cannot be read cannot be added to
            (folder / CARD).write_bytes(written)
            return
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(folder / CARD)
