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
from ..models.parts import heads_of
from ..quantization import FakeQuantize, FrozenGrid, Observer

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
    "the checkpoint has a quantized head of another number of outputs, and a quantized head has its size for good. Load it with "
    "its own number (num_labels); for another, load and save the model inside (AutoModel.from_pretrained(...)"
    ".save_pretrained(folder)), and load that with a new head:"
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


def check_names(
    model: PreTrainedModel, spec: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec], new_heads: Iterable[str] = ()
) -> None:
    """Compare what a checkpoint holds with what ``model`` needs.

    Args:
        spec: of the model; found: of the checkpoint.
        new_heads: paths of output layers that the checkpoint does not bring; only of another class one may be missing.

    Raises:
        ValueError: naming the tensors that are missing, extra, misshapen or of another type.
    """
    wanted, given = _body(spec, model.base_model_prefix), _body(found, model.base_model_prefix)
    problems = [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"extra: {name}" for name in given if name not in wanted]
    for name in wanted.keys() & given.keys():
        problems += _differences(name, wanted[name], given[name])
    wanted, given = (_of_heads(model, names, set(new_heads)) for names in (spec, found))
    # A tied output layer is in the file once, as the embedding.
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    problems += [f"missing: {name}" for name in sorted(wanted.keys() - given.keys() - tied)]
    problems += [f"extra: {name}" for name in sorted(given.keys() - wanted.keys())]
    # A float head may have another size on purpose (ignore_mismatched_sizes); codes and scales have no other.
    quantized = {name.partition(".")[0] for name in wanted if wanted[name].exact}
    both = [name for name in sorted(wanted.keys() & given.keys()) if name.partition(".")[0] in quantized]
    differing = [difference for name in both for difference in _differences(name, wanted[name], given[name])]
    if not problems and any(_is_resized(name, wanted[name], given[name]) for name in both):
        raise ValueError(_NEW_HEAD + "".join(f"\n  {difference}" for difference in differing))
    _refuse(problems + differing)


def _is_resized(name: str, wanted: TensorSpec, given: TensorSpec) -> bool:
    """Whether this is the weight of an output layer of another number of outputs."""
    is_weight = name.endswith((".weight", ".weight_codes"))
    return is_weight and given.shape[:1] != wanted.shape[:1] and given.shape[1:] == wanted.shape[1:]


def _of_heads(model: PreTrainedModel, names: Mapping[str, TensorSpec], new_heads: set[str]) -> dict[str, TensorSpec]:
    """Tensors outside the base model that a checkpoint and ``model`` must agree on; of another class, only those of its heads."""
    inside = f"{model.base_model_prefix}."
    own_class = type(model).__name__ in (model.config.architectures or ())
    heads = tuple(f"{path}." for path in heads_of(model) if path not in new_heads)
    if model is model.base_model:
        return {}
    return {name: value for name, value in names.items() if not name.startswith(inside) and (name.startswith(heads) or own_class)}


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
        config, zero_point = module.config, module.zero_point
        problems += _bad_scale("scale", scale, config.qmax - (0 if config.symmetric else config.qmin))
        if _readable(zero_point) and not bool(((zero_point >= config.qmin) & (zero_point <= config.qmax)).all()):
            problems.append(f"zero_point: outside [{config.qmin}, {config.qmax}]")
        for name, expected in module.given_values().items():
            value = getattr(module, name)
            if _readable(value) and not torch.equal(value.cpu(), expected):
                told = f"{_told(value)}, but the recipe's observer 'fixed' with {config.bits} bits makes it {_told(expected)}"
                problems.append(f"{name}: {told}")
    elif isinstance(module, Observer):
        problems += _bad_range(module)
    elif isinstance(module, (StructuredWeight, PlainWeight)) and module.is_frozen:
        if all(_readable(buffer) for buffer in module.buffers(recurse=False)):
            factors = {"weight": module.factor()} if isinstance(module, PlainWeight) else module.operand().factors
            for name, factor in factors.items():
                problems += _bad_scale(f"{name}_scale", factor.scale, factor.qmax)
                if bool((factor.values.to(torch.int16).abs() > factor.qmax).any()):
                    problems.append(f"{name}_codes: a code outside [{-factor.qmax}, {factor.qmax}]")
    return problems


def _bad_range(observer: Observer) -> list[str]:
    low, high, count = observer.min_val, observer.max_val, observer.count
    bounds = {"min_val": low, "max_val": high}
    problems = [f"{name}: NaN or infinite" for name, t in bounds.items() if _readable(t) and not bool(torch.isfinite(t).all())]
    if not problems and _readable(low) and _readable(high) and bool((low > high).any()):
        problems.append("min_val: above max_val")
    if _readable(count) and bool(count < 0):
        problems.append("count: negative")
    return problems


def _bad_scale(name: str, scale: Tensor | None, qmax: int) -> list[str]:
    if not _readable(scale):
        return []
    if not bool(torch.isfinite(scale).all()):
        return [f"{name}: NaN or infinite"]
    if not bool((scale > 0).all()):
        return [f"{name}: not positive"]
    if not bool(torch.isfinite(scale * qmax).all()):
        return [f"{name}: so large that codes stand for infinity"]
    return [] if bool(torch.isfinite(1.0 / scale).all()) else [f"{name}: too small to divide by"]


def _told(value: Tensor) -> str:
    """One number where all are the same."""
    low, high = value.min().item(), value.max().item()
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def _readable(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type != "meta"


def _refuse(problems: list[str]) -> None:
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(
            "the checkpoint does not fit its config.json; it may be damaged, edited, or of another state or structure:"
            + "".join(f"\n  {problem}" for problem in shown)
        )
