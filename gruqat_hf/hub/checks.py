"""The strict check of quantized checkpoints: transformers itself only warns, and runs with random numbers instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.plain_weight import PlainWeight
from ..layers.weight import StructuredWeight
from ..quantization import FakeQuantize, FrozenGrid

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


_NEW_HEAD = (
    "\nA quantized head has its size for good. For another number of outputs, load and save the model inside "
    "(AutoModel.from_pretrained(...).save_pretrained(folder)), and load that with a new head"
)


class TensorSpec(NamedTuple):
    """What a checkpoint says, or must say, of a tensor.

    ``exact``: the type must be this one; a float weight may have been saved in another float type than it is loaded in.
    ``dtype`` is None for a type that no model has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    exact: bool


def spec_of(model: nn.Module) -> dict[str, TensorSpec]:
    """The shape and type of every tensor that a checkpoint of ``model`` holds."""
    learned = {id(p) for m in model.modules() if isinstance(m, FakeQuantize) for p in m.parameters()}
    free = {name for name, p in model.named_parameters() if p.is_floating_point() and id(p) not in learned}
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype, name not in free) for name, tensor in model.state_dict().items()}


def read_headers(files: Iterable[str]) -> dict[str, TensorSpec]:
    """Names, shapes and types in safetensors files; no tensor is read.

    Raises:
        ValueError: a file of another format, or a damaged one.
    """
    found: dict[str, TensorSpec] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"quantized checkpoints are safetensors files, got {file}; save again with save_pretrained()")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    header = tensors.get_slice(name)
                    found[name] = TensorSpec(tuple(header.get_shape()), _DTYPES.get(header.get_dtype()), True)
        except SafetensorError as error:
            raise ValueError(f"{file} is no readable safetensors file: {error}; download or save the checkpoint again") from error
    return found


def check_names(model: PreTrainedModel, spec: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """Compare what a checkpoint holds with what ``model`` needs; only of another class the head may be missing or left over.

    Raises:
        ValueError: naming the tensors that are missing, extra, misshapen or of another type.
    """
    wanted, given = _body(spec, model.base_model_prefix), _body(found, model.base_model_prefix)
    resized = False
    problems = [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"extra: {name}" for name in given if name not in wanted]
    for name in wanted.keys() & given.keys():
        problems += _differences(name, wanted[name], given[name])
    if type(model).__name__ in (model.config.architectures or ()):
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        inside = f"{model.base_model_prefix}."
        heads = [{name for name in names if not name.startswith(inside)} - tied for names in (spec, found)]
        if any(name.startswith(inside) for name in spec):
            problems += [f"missing: {name}" for name in sorted(heads[0] - heads[1])]
            problems += [f"extra: {name}" for name in sorted(heads[1] - heads[0])]
            # A float head may have another size on purpose (ignore_mismatched_sizes); codes and scales have no other.
            quantized = {name.partition(".")[0] for name in heads[0] if not name.startswith(inside) and spec[name].exact}
            for name in sorted(heads[0] & heads[1]):
                if name.partition(".")[0] in quantized:
                    problems += _differences(name, spec[name], found[name])
                    resized = resized or found[name].shape != spec[name].shape
    _refuse(problems, _NEW_HEAD if resized else "")


def check_tensors(model: PreTrainedModel, spec: Mapping[str, TensorSpec]) -> None:
    """Check the tensors of a loaded model, those on the meta device (offloaded to disk) left out.

    Raises:
        ValueError: naming the tensors that are misshapen, of another type, or hold values that no quantizer writes.
    """
    problems: list[str] = []
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta" and name in spec:
            problems += _differences(name, spec[name], TensorSpec(tuple(tensor.shape), tensor.dtype, True))
            if not spec[name].exact and not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name}: NaN or infinite")
    # Values can be made sense of only where the shapes are right.
    if not problems:
        for path, module in model.named_modules():
            problems += [f"{path}.{problem}" for problem in _bad_values(module)]
    _refuse(problems)


def _body(names: Mapping[str, TensorSpec], prefix: str) -> dict[str, TensorSpec]:
    """Tensors of the base model, by their name in it, whether the names are those of a base model or of one with a head."""
    inside = {name[len(prefix) + 1 :]: value for name, value in names.items() if name.startswith(f"{prefix}.")}
    return inside or dict(names)


def _differences(name: str, wanted: TensorSpec, given: TensorSpec) -> list[str]:
    problems = []
    if given.shape != wanted.shape:
        problems.append(f"misshapen: {name} is {list(given.shape)}, needs {list(wanted.shape)}")
    if wanted.exact:
        fits = given.dtype == wanted.dtype
    else:
        fits = given.dtype is not None and given.dtype.is_floating_point
    if not fits:
        kind = wanted.dtype if wanted.exact else "a float type"
        problems.append(f"mistyped: {name} is {given.dtype or 'of an unknown type'}, needs {kind}")
    return problems


def _bad_values(module: nn.Module) -> list[str]:
    problems: list[str] = []
    if isinstance(module, (FakeQuantize, FrozenGrid)):
        # A learned scale is a parameter, and its magnitude counts.
        scale = module.scale.abs() if isinstance(module.scale, nn.Parameter) else module.scale
        problems += _bad_scale("scale", scale)
        config, zero_point = module.config, module.zero_point
        if _readable(zero_point) and not bool(((zero_point >= config.qmin) & (zero_point <= config.qmax)).all()):
            problems.append(f"zero_point: outside [{config.qmin}, {config.qmax}]")
    elif isinstance(module, (StructuredWeight, PlainWeight)) and module.is_frozen:
        if all(_readable(buffer) for buffer in module.buffers(recurse=False)):
            factors = {"weight": module.factor()} if isinstance(module, PlainWeight) else module.operand().factors
            for name, factor in factors.items():
                problems += _bad_scale(f"{name}_scale", factor.scale)
                if bool((factor.values.to(torch.int16).abs() > factor.qmax).any()):
                    problems.append(f"{name}_codes: a code outside [{-factor.qmax}, {factor.qmax}]")
    return problems


def _bad_scale(name: str, scale: Tensor | None) -> list[str]:
    if not _readable(scale):
        return []
    if not bool(torch.isfinite(scale).all()):
        return [f"{name}: NaN or infinite"]
    if not bool((scale > 0).all()):
        return [f"{name}: not positive"]
    return [] if bool(torch.isfinite(1.0 / scale).all()) else [f"{name}: too small to divide by"]


def _readable(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type != "meta"


def _refuse(problems: list[str], hint: str = "") -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(
            "the checkpoint does not fit its config.json; it may be damaged, edited, or of another state or structure:"
            + "".join(f"\n  {problem}" for problem in shown)
            + hint
        )
