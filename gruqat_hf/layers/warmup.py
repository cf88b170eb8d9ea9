"""Compiling beforehand what would be compiled in the first pass."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..quantization import Observer
from .layer import GRULayer
from .lifecycle import LifecycleError, QuantState

Module = TypeVar("Module", bound=nn.Module)


def warm_up(
    module: Module, batch_size: int, sequence_length: int, *, training: bool = False, masked: bool = False, progress: bool = True
) -> Module:
    """Compile the kernels that passes over inputs of this size will need: on a GPU those of Triton, on a CPU those in C++.

    They would be compiled in the first pass, which takes seconds for each layer of its own kind. Compiled ones are kept on disk,
    so that the next process is quick. A copy of each layer runs on random values: of ``module`` nothing changes. A layer whose
    observers have seen nothing is calibrated on these, in the copy.

    Args:
        module: a GRULayer, GRUStack, model, or anything that holds some.
        batch_size, sequence_length: of the inputs to come. Other lengths mostly run the same kernels, other batches not always.
        training: whether for training steps, with gradients, instead of inference.
        masked: whether inputs come with a mask of padded steps.
        progress: show a bar.

    Returns:
        ``module``.

    Raises:
        ValueError: sizes below 1, a module without a GRULayer, or one whose tensors are on no device yet.
        LifecycleError: frozen layers and ``training=True``.
    """
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"warm_up({name}=...) must be an integer of at least 1, got {size!r}")
    layers = [layer for layer in module.modules() if isinstance(layer, GRULayer)]
    if not layers:
        raise ValueError(f"warm_up takes a module that holds a GRULayer, and {type(module).__name__} holds none")
    if training and any(layer.quant_state == QuantState.FROZEN for layer in layers):
        raise LifecycleError("warm_up(training=True): frozen layers are not trained; call warm_up(training=False)")
    if any(tensor.device.type == "meta" for layer in layers for tensor in (*layer.parameters(), *layer.buffers())):
        raise ValueError("warm_up: the weights are on the meta device, where nothing runs; load them first, and not to disk")
    with torch.inference_mode(False):
        for layer in tqdm(layers, desc="compiling", disable=not progress):
            _run_copy(layer, batch_size, sequence_length, training, masked)
    return module


def _run_copy(layer: GRULayer, batch_size: int, sequence_length: int, training: bool, masked: bool) -> None:
    trial = copy.deepcopy(layer)
    for part in trial.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()  # what the program collects with them is not for random values
        if isinstance(part, Observer):
            part.replicated = True  # other ranks need not warm up
    tensor = trial.bias_input if trial.bias_input is not None else next(iter([*trial.parameters(), *trial.buffers()]))
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    generator = torch.Generator(tensor.device)  # of its own: what the program draws stays the same
    shape = (sequence_length, batch_size, trial.input_size)
    x = torch.randn(shape, generator=generator, device=tensor.device, dtype=dtype)
    mask = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool) if masked else None
    if trial.batch_first:
        x, mask = x.transpose(0, 1), None if mask is None else mask.t()
    if trial.quant_state == QuantState.QAT and trial.uncalibrated():
        trial.calibrate([x], progress=False)
    trial.train(training)
    with torch.set_grad_enabled(training):
        out, last = trial(x.clone().requires_grad_(training), mask=mask)
        if training:
            (out.sum() + last.sum()).backward()
