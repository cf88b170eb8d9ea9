"""Saving and publishing models together with what belongs beside their weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .card import FILE as CARD
from .card import is_generated, model_card
from .publish import publish
from .results import Results, read_results

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
RESULTS = "results.json"


class SharingMixin:
    """save_pretrained and push_to_hub that write a model card, for a transformers model."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Does nothing for the package's own classes: checkpoints refer to the package and carry no copy of its source."""
        if not cls.__module__.startswith("gruqat_hf."):
            super().register_for_auto_class(auto_class)  # type: ignore[misc]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        results: Results | Mapping[str, Any] | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        """Save weights, config, remote-code shim and model card; see ``transformers.PreTrainedModel.save_pretrained``.

        A README.md that was not generated, or whose marker line was deleted, stays as it is.

        Args:
            push_to_hub: whether to call :meth:`push_to_hub` as well, for ``repo_id`` (by default named after the folder).
            results: results JSON of the training (a path or its contents) to go into the card; it and its plots are copied along.

        Raises:
            ValueError: results that are damaged or of another model; nothing is saved then.
        """
        folder = Path(save_directory)
        if results is not None:
            results = read_results(results)
            results.check_model(self.config.to_dict())  # type: ignore[attr-defined]
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)  # type: ignore[misc]
        if not (is_main_process and folder.is_dir()):
            return
        _drop_stale_weights(folder)
        write_card(self, folder, results, f"path/to/{folder.resolve().name}", self.model_tags or [])  # type: ignore[attr-defined]
        if push_to_hub:
            if "max_shard_size" in kwargs:
                hub["max_shard_size"] = kwargs["max_shard_size"]
            self.push_to_hub(hub.pop("repo_id", folder.name), results=results, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        results: Results | Mapping[str, Any] | str | os.PathLike | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> Any:
        """Upload weights, config, remote-code shim and model card in one commit: the repository has all of it or none.

        Weight files of an earlier upload that would be mistaken for the new ones are deleted in the same commit. A README.md in
        the repository that was not generated, or whose marker line was deleted, stays as it is but for tags.

        Args:
            repo_id: "user/name"; made if it does not exist.
            results: as in :meth:`save_pretrained`.
            commit_message, commit_description: of the commit.
            private: whether a new repository is private.
            token: access token; None for the one that is logged in.
            revision: branch to upload to, made if it does not exist; None for "main".
            create_pr: whether to open a pull request instead.
            max_shard_size: size beyond which weights are split into several files.
            tags: further tags of the model.

        Returns:
            ``huggingface_hub.CommitInfo``.

        Raises:
            ValueError: results that are damaged or of another model, or an id that no repository can have.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses, naming its reason.
            ConnectionError: the connection broke, again and again.
        """
        results = read_results(results) if results is not None else None
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, results=results, max_shard_size=max_shard_size)
            # Again, for the card names the place to load from.
            write_card(self, folder, results, repo_id, [*(self.model_tags or []), *(tags or [])])  # type: ignore[attr-defined]
            return publish(
                folder,
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


_HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")


def _drop_stale_weights(folder: Path) -> None:
    """Delete what an earlier save left: one file of weights is loaded rather than new shards; an index may lack its shards."""
    whole, index = folder / _WEIGHTS, folder / _INDEX
    if whole.exists() and index.exists():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # transformers has deleted the shards that do not belong to the present save.
        stale = whole if all((folder / shard).is_file() for shard in shards) else index
        stale.unlink()


def write_card(
    model: Any, folder: Path, results: Results | None, location: str, tags: list[str], license: str | None = None
) -> None:
    """Write the card, and what it shows, unless the folder has one that a person wrote; see :func:`model_card`."""
    path = folder / CARD
    if path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return
    weights = [file for file in folder.glob("model*.safetensors") if file.is_file()]
    size = sum(file.stat().st_size for file in weights) or None
    card = model_card(model, results, location=location, weight_bytes=size, tags=tags, license=license)
    path.write_text(f"{card}\n", encoding="utf-8")
    if results is not None:
        copy_results(results.completed(model, location.rpartition("/")[2]), folder)


def copy_results(results: Results, folder: Path) -> None:
    """Put the results' JSON and its plots, which the card shows, into ``folder``."""
    data = dict(results.data)
    if results.plots:
        data["plots"] = [{**plot, "path": path.name} for plot, (path, _) in zip(data["plots"], results.plots)]
    for path, _ in results.plots:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    (folder / RESULTS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
