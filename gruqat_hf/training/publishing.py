"""Uploads by a Trainer, during a training and after it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, PushInProgress

from ..sharing.card import FILE as CARD
from ..sharing.card import is_generated
from ..sharing.publish import publish
from ..sharing.results import Results, read_results
from ..sharing.saving import SharingMixin, write_card
from ..sharing.shim import FILE as SHIM

logger = logging.getLogger("gruqat_hf")

_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")


class PublishingMixin:
    """Trainer's uploads, as ``model.push_to_hub`` does them: one commit that loads, with the model's own card.

    Trainer's own replace the card by one that knows nothing of the model, leave the remote code out of what they upload during
    the training, and read from folders in which the training goes on writing and deleting. A model that is not one of this
    package's is left to Trainer.
    """

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        results: Results | Mapping[str, Any] | str | os.PathLike | None = None,
    ) -> None:
        """Write the model's card into ``args.output_dir``, unless there is one that a person wrote.

        Args:
            language, license, tags, finetuned_from, dataset_tags: metadata for the Hub.
            model_name, tasks, dataset, dataset_args: not used: the model says what it is, ``results`` what it was measured on.
            results: as in ``model.push_to_hub``.

        Raises:
            ValueError: results that are damaged or of another model.
        """
        model = self._publishable()
        if model is None:
            names = ("language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset")
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset)
            super().create_model_card(**dict(zip(names, given)), dataset_args=dataset_args)  # type: ignore[misc]
            return
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"language": language, "base_model": finetuned_from, "datasets": _listed(dataset_tags) or None}
        self._write_card(model, folder, results, _listed(tags), license, metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        results: Results | Mapping[str, Any] | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model in ``args.output_dir`` and upload that folder in one commit, without checkpoints.

        Args:
            commit_message: of the commit.
            blocking: whether to wait for the upload; else the result is a Future.
            token, revision, private: instead of ``args.hub_token``, ``args.hub_revision`` and ``args.hub_private_repo``.
            results: results JSON of the training (a path or its contents) to go into the card.
            kwargs: of :meth:`create_model_card`.

        Returns:
            ``huggingface_hub.CommitInfo``; None in all processes but the first.

        Raises:
            ValueError, huggingface_hub.errors.HfHubHTTPError, ConnectionError: as ``model.push_to_hub``.
        """
        args = self.args  # type: ignore[attr-defined]
        if self._publishable() is None:
            given = {} if private is None else {"private": private}
            return super().push_to_hub(commit_message, blocking, token, revision, **given, **kwargs)  # type: ignore[misc]
        results = None if results is None else read_results(results)
        self._event("on_push_begin")
        token = args.hub_token if token is None else token
        private = args.hub_private_repo if private is None else private
        self.save_model(_internal_call=True)  # type: ignore[attr-defined]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        if self.hub_model_id is None:
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
            self.push_in_progress = None
        self.create_model_card(results=results, **kwargs)
        self._finish_current_push()  # type: ignore[attr-defined]
        staged = _staged()
        _copy(Path(args.output_dir), staged)
        revision = args.hub_revision if revision is None else revision
        message = commit_message or "End of training"
        job = self._upload(staged, commit_message=message, token=token, revision=revision, private=private)
        return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, state = self.args, self.state  # type: ignore[attr-defined]
        model = self._publishable()
        if model is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
            return
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:  # type: ignore[attr-defined]
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        checkpoint, out = Path(checkpoint_folder), Path(args.output_dir)
        if not any(_WEIGHTS.fullmatch(path.name) for path in checkpoint.iterdir()):
            logger.warning("%s holds no model.safetensors, as sharded checkpoints do, and is not uploaded", checkpoint)
            return
        self._event("on_push_begin")
        staged = _staged()
        _copy(out, staged, weights=False)
        for path in checkpoint.iterdir():
            if path.name in _OF_A_MODEL or _WEIGHTS.fullmatch(path.name):
                shutil.copy2(path, staged / path.name)
        if (out / CARD).is_file() and not is_generated((out / CARD).read_text(encoding="utf-8", errors="replace")):
            shutil.copy2(out / CARD, staged / CARD)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)  # type: ignore[attr-defined]
        if processor is not None:
            processor.save_pretrained(staged)
        self._write_card(model, staged)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            shutil.copytree(checkpoint, staged / name)
        when = f"step {state.global_step}" if args.save_strategy == SaveStrategy.STEPS else f"epoch {int(state.epoch)}"
        job = self._upload(
            staged,
            commit_message=f"Training in progress, {when}",
            token=args.hub_token,
            revision=args.hub_revision,
            private=args.hub_private_repo,
        )
        job.add_done_callback(lambda done: _tell(done, checkpoint.name))
        if busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _publishable(self) -> Any:
        """The model, if it is one of this package's."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # type: ignore[attr-defined]
        return model if isinstance(model, SharingMixin) else None

    def _event(self, name: str) -> None:
        getattr(self.callback_handler, name)(self.args, self.state, self.control)  # type: ignore[attr-defined]

    def _write_card(
        self,
        model: Any,
        folder: Path,
        results: Results | Mapping[str, Any] | str | os.PathLike | None = None,
        tags: list[str] | None = None,
        license: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        results = None if results is None else read_results(results)
        location = self.hub_model_id or self.args.hub_model_id or f"path/to/{folder.resolve().name}"  # type: ignore[attr-defined]
        write_card(model, folder, results, location, [*(model.model_tags or []), *(tags or [])], license)
        changes = {name: value for name, value in (metadata or {}).items() if value is not None}
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        if changes and is_generated(text):
            card = ModelCard(text)
            for name, value in changes.items():
                setattr(card.data, name, value)
            (folder / CARD).write_text(f"{card}\n", encoding="utf-8")

    def _upload(self, staged: Path, **options: Any) -> Future:
        """Upload a folder of its own, and delete it; one upload after the other."""

        def job() -> Any:
            try:
                return publish(staged, self.hub_model_id, **options)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        if not hasattr(self, "_uploads"):
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        return self._uploads.submit(job)


_OF_A_MODEL = (CONFIG_NAME, GENERATION_CONFIG_NAME, SHIM, TRAINING_ARGS_NAME)


def _staged() -> Path:
    """A new folder for what is uploaded: while it is, the training may write and delete where it comes from."""
    return Path(tempfile.mkdtemp(prefix="gruqat-upload-"))


def _copy(source: Path, target: Path, weights: bool = True) -> None:
    """Copy what Trainer uploads of its output folder: all but checkpoints and what is private by its name."""
    for path in sorted(source.iterdir()):
        private = path.name.startswith(("_", ".", f"{PREFIX_CHECKPOINT_DIR}-"))
        if private or (not weights and (path.name == CARD or _WEIGHTS.fullmatch(path.name))):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _tell(done: Future, what: str) -> None:
    error = done.exception()
    if error is not None:
        logger.warning("%s was not uploaded, the training goes on: %s", what, error)
