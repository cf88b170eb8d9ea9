"""Embedding and head of a model, quantized together with its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..layers.plain_weight import PlainWeight
from ..quantization import QuantizerConfig, QuantRecipe
from .embedding import QuantizableEmbedding
from .linear import WideLinear

if TYPE_CHECKING:
    from .pretrained import GruQatPreTrainedModel


def embedding_of(model: nn.Module) -> QuantizableEmbedding | None:
    """The embedding; None for a model of float features, and for one of the user's own type."""
    return next((module for module in model.modules() if isinstance(module, QuantizableEmbedding)), None)


def heads_of(model: nn.Module) -> dict[str, WideLinear]:
    """The output layers, by their path; none in a base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WideLinear)}


def parts_of(model: nn.Module) -> list[PlainWeight]:
    """Embedding and output layers."""
    return [module for module in model.modules() if isinstance(module, PlainWeight)]


def is_tied(model: GruQatPreTrainedModel) -> bool:
    """Whether the output layer has the embedding's weight."""
    return bool(model._tied_weights_keys) and model.config.tie_word_embeddings and embedding_of(model) is not None


def table_config(recipe: QuantRecipe) -> QuantizerConfig | None:
    """How the one weight of a tied embedding and output layer is quantized.

    Raises:
        ValueError: the recipe has two ways.
    """
    if recipe.embedding is not None and recipe.head is not None and recipe.embedding != recipe.head:
        raise ValueError(
            "with tie_word_embeddings the embedding and the head are one table, but QuantRecipe.embedding and QuantRecipe.head "
            f"differ ({recipe.embedding} and {recipe.head}); make them equal, leave one out, or use tie_word_embeddings=False"
        )
    return recipe.embedding if recipe.embedding is not None else recipe.head


def prepare_parts(model: GruQatPreTrainedModel, recipe: QuantRecipe) -> None:
    """Attach the recipe's quantizers to embedding and heads.

    Raises:
        ValueError: a quantizer that a part cannot have; none is changed.
    """
    base, tied = model.base_model, is_tied(model)
    if type(getattr(base, "embed_tokens", None)) is nn.Embedding:  # one that set_input_embeddings() was given
        base.embed_tokens = QuantizableEmbedding.of(base.embed_tokens)
    embedding, heads = embedding_of(model), heads_of(model)
    try:
        if embedding is not None:
            embedding.prepare_qat(table_config(recipe) if tied else recipe.embedding)
        for head in heads.values():
            head.prepare_qat(None if tied else recipe.head, recipe.head_input)
    except ValueError:
        for part in parts_of(model):
            part.abandon_qat()
        raise


def freeze_parts(model: GruQatPreTrainedModel) -> None:
    """Replace the weights of embedding and heads by codes; that of a tied head goes, for the embedding has its codes."""
    for part in parts_of(model):
        part.freeze()
    embedding = embedding_of(model)
    if is_tied(model) and embedding is not None and embedding.is_frozen:
        for head in heads_of(model).values():
            head.weight = None
    _follow_ties(model)


def dequantize_parts(model: GruQatPreTrainedModel) -> None:
    """Back to float weights; a tied head has the embedding's again."""
    for part in parts_of(model):
        part.dequantize()
    _follow_ties(model)
    model.tie_weights()


def _follow_ties(model: GruQatPreTrainedModel) -> None:
    # transformers keeps a list of the tied weights, and looks each of them up.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def recipe_in_force(model: GruQatPreTrainedModel, recipe: QuantRecipe) -> QuantRecipe:
    """``recipe``, the layers', with what embedding and heads really have; the same one where they have what it says.

    They differ where the lifecycle was called on the stack alone, or a head is not the checkpoint's. A point that the model has
    no part for stays as it is, for a model with that part.
    """
    present: dict[str, QuantizerConfig | None] = {}
    for part in parts_of(model):
        present.update(part.configs)
    if is_tied(model):
        present["head"] = present["embedding"]
    changed = {point: config for point, config in present.items() if config != getattr(recipe, point)}
    return replace(recipe, name=None, **changed) if changed else recipe
