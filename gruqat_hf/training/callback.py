"""The schedule of a quantization-aware training, as a callback of transformers' Trainer."""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..layers import QuantState
from ..layers.lifecycle import fake_quantizers
from ..quantization import FakeQuantize
from ..quantization.meter import SaturationMeter
from .metrics import quantizer_metrics
from .sharding import is_sharded

logger = logging.getLogger("gruqat_hf")


class QATCallback(TrainerCallback, ExportableState):
    """Switches observers and rounding on and off while a model in the QAT state trains, logs metrics, and freezes it at the end.

    What is switched depends on the number of steps done alone, so that a resumed training goes on exactly where it was; one that
    is resumed with another schedule says so. Evaluation always rounds, as the frozen model will.

    Args:
        fake_quant_from: optimizer steps done before values are rounded in training; until then the layers compute in float while
            the observers learn the ranges. An integer, or a share of the training in (0, 1).
        observe_until: optimizer steps done after which the observers stand still, likewise; None for never.
        freeze_at_end: whether the model is frozen when the training ends (after the best checkpoint was loaded, where asked for).
            What ``trainer.evaluate()`` and ``trainer.save_model()`` see then is the integer model.
        log_quantizers: "each" adds range and saturation of every quantizer to the logs, "total" one saturation over all, "none"
            nothing. It costs one more pass over the layers at the steps that are logged.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        fake_quant_from: int | float = 0,
        observe_until: int | float | None = None,
        freeze_at_end: bool = True,
        log_quantizers: str = "each",
    ) -> None:
        fake_quant_from = _step("fake_quant_from", fake_quant_from, 0)
        if observe_until is not None:
            observe_until = _step("observe_until", observe_until, 1)
        if log_quantizers not in ("each", "total", "none"):
            raise ValueError(f"QATCallback.log_quantizers must be 'each', 'total' or 'none', got {log_quantizers!r}")
        self.fake_quant_from, self.observe_until = fake_quant_from, observe_until
        self.freeze_at_end, self.log_quantizers = freeze_at_end, log_quantizers
        self._quantizers: list[FakeQuantize] = []
        self._switches: tuple[bool, bool] | None = None
        self._metrics: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What Trainer keeps in a checkpoint, and restores with ``restore_callback_states_from_checkpoint=True``."""
        names = ("fake_quant_from", "observe_until", "freeze_at_end", "log_quantizers")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check that this training can be done as it was asked for.

        Raises:
            ValueError: a model that is not in QAT, several GPUs in one process, or freezing of a sharded model.
        """
        present = getattr(model, "quant_state", None)
        if present == QuantState.FROZEN:
            raise ValueError(
                "QATCallback trains a model in the qat state, got one in the frozen state, whose weights are integers; load the "
                "checkpoint it was frozen from, or call model.dequantize().prepare_qat(recipe)"
            )
        if present != QuantState.QAT:
            what = f"a model in the {present} state" if present is not None else type(model).__name__
            raise ValueError(f"QATCallback trains a model in the qat state, got {what}; call model.prepare_qat(recipe) first")
        if args.n_gpu > 1:
            raise ValueError(
                f"QATCallback: this process sees {args.n_gpu} GPUs, and DataParallel would lose what the observers of all but "
                "the first saw; start one process a GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        if self.freeze_at_end and is_sharded(model):
            raise ValueError(
                "QATCallback(freeze_at_end=True): the weights are spread over the ranks and cannot be turned into integers; pass "
                "freeze_at_end=False, save_model(), and call from_pretrained(...).freeze() in one process"
            )
        if (rounds_from := _in_steps(self.fake_quant_from, state.max_steps)) >= state.max_steps:
            logger.warning(
                "QATCallback: rounding would begin after step %d, but the training ends after step %d, and never rounds",
                rounds_from,
                state.max_steps,
            )
        self._tell_of_another_schedule(state)
        self._quantizers = list(fake_quantizers(model))
        self._remove_meters()
        self._switches = None
        self._metrics = {}
        self._switch(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._switch(state)
        if self.log_quantizers != "none" and _will_log(args, state, kwargs.get("train_dataloader")):
            for quantizer in self._quantizers:
                quantizer.meter = SaturationMeter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if any(quantizer.meter is not None for quantizer in self._quantizers):
            self._metrics = quantizer_metrics(model, self.log_quantizers == "each")
            self._remove_meters()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # What is logged is in the history already; callbacks that come after this one read `logs`.
        if logs is not None and "loss" in logs and self._metrics:
            logs.update(self._metrics)
            state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        for quantizer in self._quantizers:
            quantizer.observer_enabled = quantizer.fake_quant_enabled = True
        self._remove_meters()
        self._quantizers = []
        if self.freeze_at_end and model.quant_state == QuantState.QAT:  # another callback may have done it
            model.freeze()
            logger.info("step %d: the model is frozen to integers", state.global_step)

    def _switch(self, state: TrainerState) -> None:
        """Set what the coming step does."""
        done, total = state.global_step, state.max_steps
        observes = self.observe_until is None or done < _in_steps(self.observe_until, total)
        rounds = done >= _in_steps(self.fake_quant_from, total)
        if (observes, rounds) == self._switches:
            return
        self._switches = (observes, rounds)
        for quantizer in self._quantizers:
            quantizer.observer_enabled, quantizer.fake_quant_enabled = observes, rounds
        logger.info("step %d: observers %s, rounding %s", done, "on" if observes else "off", "on" if rounds else "off")

    def _tell_of_another_schedule(self, state: TrainerState) -> None:
        """Warn where a checkpoint was trained by other settings than those that go on."""
        name, present = type(self).__name__, self.state()
        saved = state.stateful_callbacks.get(name)
        if saved is None or isinstance(saved, dict):
            # Also where there was none: Trainer keeps the states of those callbacks only that have one here.
            state.stateful_callbacks[name] = present
        before = saved.get("args", {}) if isinstance(saved, dict) else {}
        changed = [key for key in ("fake_quant_from", "observe_until") if key in before and before[key] != present["args"][key]]
        if changed and state.global_step > 0:
            what = "; ".join(f"{key}: {before[key]!r}, now {present['args'][key]!r}" for key in changed)
            logger.warning("step %d: the training goes on with another schedule than it began with (%s)", state.global_step, what)

    def _remove_meters(self) -> None:
        for quantizer in self._quantizers:
            quantizer.meter = None


def _step(name: str, value: Any, least: int) -> int | float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (value >= least if isinstance(value, numbers.Integral) else 0.0 < value < 1.0):
        what = f"a number of steps from {least}, or a share of them in (0, 1)"
        raise ValueError(f"QATCallback.{name} must be {what}, got {value!r}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _in_steps(value: int | float, total: int) -> int:
    return value if isinstance(value, int) else math.ceil(value * total)


def _will_log(args: TrainingArguments, state: TrainerState, loader: Any) -> bool:
    """Whether the step that now begins ends with a log of the loss."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy == IntervalStrategy.EPOCH:
        batches = _length(loader)
        per_epoch = None if batches is None else max(1, math.ceil(batches / args.gradient_accumulation_steps))
        return step == state.max_steps or (per_epoch is not None and step % per_epoch == 0)
    return False


def _length(loader: Any) -> int | None:
    """Batches in an epoch; None where nobody knows. (A DataLoader has ``__len__`` also where its data set has none.)"""
    try:
        return len(loader)
    except TypeError:
        return None
