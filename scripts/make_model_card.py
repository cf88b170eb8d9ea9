"""Makes model cards from the results.json that lies in a saved model's folder; the weights are not needed.

    python scripts/make_model_card.py outputs/digits/frozen/results.json --out model_cards/gru-digits-monarch-int8
    python scripts/make_model_card.py model_cards/*/results.json       # again, in place

(`model.save_pretrained(folder, results="outputs/digits/results.json")` puts it there; scripts/train_qat.py does.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

import gruqat_hf
from gruqat_hf.quantization import QuantRecipe
from gruqat_hf.sharing.card import FILE, model_card
from gruqat_hf.sharing.results import Results, read_results
from gruqat_hf.sharing.saving import copy_results

NEEDED = ("name", "architecture", "config")


def skeleton(results: Results) -> PreTrainedModel:
    """The model that the results are of, without weights.

    Raises:
        ValueError: results that do not say what the model was.
    """
    said = results.data
    if missing := [name for name in NEEDED if not said.get(name)]:
        raise ValueError(f"the results in {results.folder} lack {', '.join(missing)}; take the file beside the saved model")
    config = AutoConfig.for_model(**said["config"])
    with torch.device("meta"):
        model = getattr(gruqat_hf, said["architecture"])(config)
    if said.get("recipe"):
        quantization: dict[str, Any] = {"quant_method": "gruqat", "state": _state(said), "recipe": QuantRecipe.of(said["recipe"])}
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map=None)
        model.sync_quantization()
    return model


def _state(said: dict[str, Any]) -> str:
    return said.get("state") or ("frozen" if said.get("recipe") else "float")


def make_card(results: Results) -> str:
    """Text of the card."""
    model, name = skeleton(results), results.data["name"]
    size = (results.data.get("bytes") or {}).get(_state(results.data))
    return f"{model_card(model, results, location=f'path/to/{name}', weight_bytes=size)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a training")
    parser.add_argument("--name", help="of the model (default: as in the results)")
    parser.add_argument("--license", help="of the weights, as the Hub's id (default: as in the results)")
    parser.add_argument("--out", type=Path, help="folder of the card, its results and its plots (default: that of the results)")
    args = parser.parse_args()
    if args.out is not None and len(args.results) > 1:
        parser.error("--out takes one card, so pass one results.json")
    for path in args.results:
        said = {name: value for name in ("name", "license") if (value := getattr(args, name)) is not None}
        results = read_results(path)
        results = results._replace(data={**results.data, **said})
        out = args.out or path.parent
        card = make_card(results)
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_text(card, encoding="utf-8")
        copy_results(results, out)
        print(out / FILE)


if __name__ == "__main__":
    main()
