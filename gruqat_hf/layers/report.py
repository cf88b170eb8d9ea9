"""What a model is made of: bits, bytes and the path that ran, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..quantization import POINTS
from .plain_weight import PlainWeight
from .recurrent import GRUBase


@dataclass(frozen=True)
class LayerReport:
    """One direction of one layer.

    Attributes:
        name: path of the module.
        structures: kinds of the input and the hidden weight.
        state: "float", "qat" or "frozen".
        bits: bits of every quantized point, by its name in QuantRecipe.
        tensor_bytes: bytes of parameters and buffers, as a checkpoint holds them.
        dense_bytes: bytes of the same layer as a dense fp32 GRU.
        path: which scan backend ran last, and why.
    """

    name: str
    structures: tuple[str, str]
    state: str
    bits: dict[str, int]
    tensor_bytes: int
    dense_bytes: int
    path: str

    @property
    def share(self) -> float:
        """Bytes as a share of the dense fp32 layer's."""
        return self.tensor_bytes / self.dense_bytes


@dataclass(frozen=True)
class PartReport:
    """An embedding or an output layer.

    Attributes:
        name: path of the module.
        point: "embedding" or "head".
        shape: of the weight, ``(rows, row)``.
        state: "float", "qat" or "frozen".
        bits: bits of every quantized point, by its name in QuantRecipe.
        scales: number of the weight's scales; 0 in float.
        tensor_bytes: bytes of parameters and buffers, those left out that an earlier part holds: of a tied head, its weight.
        float_bytes: bytes of the same part in fp32.
    """

    name: str
    point: str
    shape: tuple[int, int]
    state: str
    bits: dict[str, int]
    scales: int
    tensor_bytes: int
    float_bytes: int

    @property
    def share(self) -> float:
        """Bytes as a share of the part in fp32."""
        return self.tensor_bytes / self.float_bytes


@dataclass(frozen=True)
class Report:
    """The layers of a model, its embedding and its head; ``str()`` is a table."""

    layers: tuple[LayerReport, ...]
    parts: tuple[PartReport, ...]
    other_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the whole model, embeddings and heads included."""
        return self.other_bytes + sum(item.tensor_bytes for item in (*self.layers, *self.parts))

    def __str__(self) -> str:
        header = ("layer", "input / hidden", "state", "bits", "bytes", "of dense fp32", "ran on")
        rows = [
            (
                layer.name,
                " / ".join(layer.structures),
                layer.state,
                " ".join(f"{point}:{bits}" for point, bits in layer.bits.items()) or "float",
                f"{layer.tensor_bytes:,}",
                f"{layer.share:.1%}",
                layer.path,
            )
            for layer in self.layers
        ]
        for part in self.parts:
            bits = " ".join(f"{point}:{bits}" for point, bits in part.bits.items()) or "float"
            scales = f"{part.scales:,} scale{'s' if part.scales != 1 else ''}" if part.scales else ""
            shape = f"{part.point} {part.shape[0]:,} x {part.shape[1]:,}"
            rows.append((part.name, shape, part.state, bits, f"{part.tensor_bytes:,}", f"{part.share:.1%}", scales))
        if self.other_bytes or not self.parts:
            rows.append(("the rest", "", "", "", f"{self.other_bytes:,}", "", ""))
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows])


def report(module: nn.Module) -> Report:
    """What the GRU layers inside ``module``, embeddings and heads are made of."""
    layers = [(name, child) for name, child in module.named_modules() if isinstance(child, GRUBase)]
    seen = {id(tensor) for _, layer in layers for tensor in _tensors(layer)}
    parts = []
    for name, child in module.named_modules():
        if isinstance(child, PlainWeight):
            parts.append(_part_report(name, child, seen))
            seen.update(id(tensor) for tensor in _tensors(child))
    other = sum(_bytes(tensor) for tensor in _tensors(module) if id(tensor) not in seen)
    return Report(tuple(_layer_report(name, layer) for name, layer in layers), tuple(parts), other)


def _part_report(name: str, part: PlainWeight, seen: set[int]) -> PartReport:
    rows, row = part.weight_shape
    bias = getattr(part, "bias", None)
    return PartReport(
        name=name or type(part).__name__,
        point=part.point,
        shape=(rows, row),
        state=str(part.quant_state),
        bits={point: config.bits for point, config in part.configs.items() if config is not None},
        scales=part.scale_count,
        tensor_bytes=sum(_bytes(tensor) for tensor in _tensors(part) if id(tensor) not in seen),
        float_bytes=4 * (rows * row + (0 if bias is None else bias.numel())),
    )


def _layer_report(name: str, layer: GRUBase) -> LayerReport:
    sizes = (layer.input_size, layer.hidden_size)
    dense = 3 * layer.hidden_size * (sum(sizes) + (2 if layer.bias else 0))
    bits = {point: config.bits for point in POINTS if (config := getattr(layer.recipe, point, None)) is not None}
    if layer.weight_input.mid is None:
        bits.pop("mid_input", None)
    if layer.weight_hidden.mid is None:
        bits.pop("mid_hidden", None)
    return LayerReport(
        name=name or type(layer).__name__,
        structures=(layer.structure_input.kind, layer.structure_hidden.kind),
        state=str(layer.quant_state),
        bits=bits,
        tensor_bytes=sum(_bytes(tensor) for tensor in _tensors(layer)),
        dense_bytes=4 * dense,
        path=layer.last_path,
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
