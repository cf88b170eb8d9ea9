"""Embedding and head of a model, quantized together with its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..layers.lifecycle import LifecycleError, QuantState
from ..layers.plain_weight import PlainWeight
from ..quantization import QuantizerConfig, QuantRecipe
from .embedding import QuantizableEmbedding
from .linear import WideLinear

if TYPE_CHECKING:
    from .pretrained import GruQatPreTrainedModel


#: Why a part cannot be replaced.
FROZEN_PART = (
    "{call}() needs a float weight, but the {part} is frozen to integers, and a new one has no scales; call dequantize() first, "
    "then prepare_qat(recipe), calibrate(loader) and freeze() again"
)


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


def require_one_table(model: GruQatPreTrainedModel) -> None:
    """Refuse an output layer with a weight of its own where the config ties it to the embedding.

    transformers warns of a checkpoint that holds both, and leaves them apart; quantized they are one table.

    Raises:
        ValueError: naming the ways out.
    """
    embedding = model.get_input_embeddings()
    if not (model._tied_weights_keys and model.config.tie_word_embeddings and isinstance(embedding, nn.Embedding)):
        return
    for name, head in heads_of(model).items():
        if head.weight is not None and head.weight is not embedding.weight:
            raise ValueError(
                f"config.tie_word_embeddings=True, but {name}.weight is not the embedding's, as after loading a checkpoint that "
                "holds both. Set model.config.tie_word_embeddings = False to keep both, or call model.tie_weights() to go on "
                "with the embedding's alone"
            )


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
    base = model.base_model
    if _has_plain_embedding(model):
        base.embed_tokens = QuantizableEmbedding.of(base.embed_tokens)
    for name in _plain_heads(model):
        setattr(model, name, WideLinear.of(getattr(model, name)))
    embedding, heads, tied = embedding_of(model), heads_of(model), is_tied(model)
    try:
        if embedding is not None:
            embedding.prepare_qat(table_config(recipe) if tied else recipe.embedding)
        for head in heads.values():
            head.prepare_qat(None if tied else recipe.head, recipe.head_input)
    except ValueError:
        for part in parts_of(model):
            part.abandon_qat()
        raise


def _has_plain_embedding(model: GruQatPreTrainedModel) -> bool:
    """Whether the embedding is one of PyTorch's own, which the user put in its place."""
    return type(getattr(model.base_model, "embed_tokens", None)) is nn.Embedding


def _plain_heads(model: GruQatPreTrainedModel) -> list[str]:
    """Output layers that are PyTorch's own, which the user put in their place."""
    return [name for name in model.head_names if type(getattr(model, name, None)) is nn.Linear]


def require_one_state(model: GruQatPreTrainedModel) -> None:
    """Refuse an embedding or a head whose state is neither float nor that of the layers: no checkpoint can say so.

    Raises:
        LifecycleError: naming the part and the call that would be right.
    """
    state = model.quant_state
    for name, part in model.named_modules():
        if isinstance(part, PlainWeight) and part.quant_state not in (QuantState.FLOAT, state):
            raise LifecycleError(
                f"the layers are {state}, but {name} is {part.quant_state}: the lifecycle was called on a part of the model. "
                f"{_ALONG[state]}; such calls go to the whole model"
            )


def lags_behind(model: GruQatPreTrainedModel, state: QuantState) -> bool:
    """Whether the layers are in ``state`` already, but embedding or head are left behind by a call on a part of the model."""
    left = {QuantState.FROZEN: QuantState.QAT, QuantState.FLOAT: QuantState.FROZEN}[state]
    return model.quant_state == state and any(part.quant_state == left for part in parts_of(model))


_ALONG = {
    QuantState.FLOAT: "Call dequantize() of the whole model to bring a frozen part along, abandon_qat() of a part in QAT",
    QuantState.QAT: "Call freeze() of the whole model to bring the layers along",
    QuantState.FROZEN: "Call freeze() of the whole model to bring it along",
}


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
    present: dict[str, QuantizerConfig | None] = {"embedding": None} if _has_plain_embedding(model) else {}
    present.update({"head": None, "head_input": None} if _plain_heads(model) else {})
    for part in parts_of(model):
        present.update(part.configs)
    if is_tied(model):
        present["head"] = present["embedding"]
    changed = {point: config for point, config in present.items() if config != getattr(recipe, point)}
    return replace(recipe, name=None, **changed) if changed else recipe
