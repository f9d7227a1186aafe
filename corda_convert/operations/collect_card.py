"""The card of a folder of covariances."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from corda_convert.output.licence import Licence
from corda_convert.output.model_card import Card, is_hub_id, render_card

SNIPPET = """from corda_convert import DecomposeOptions, decompose

decompose(MODEL, covariances="{repo}", output="residual", options=DecomposeOptions(mode="kpm", rank=128))"""


def covariance_card(
    receipt: Mapping[str, Any], metadata: Mapping[str, str], licence: Licence, *, folder_name: str
) -> str:
    """The text of `README.md`. `metadata` are those of the files; `licence` is the model's.

    The front matter names no base model: the Hub would list the covariances as a fine-tune of it.
    """
    model = metadata.get("model")
    shown = (
        None if model is None else f"[{model}](https://huggingface.co/{model})" if is_hub_id(model) else f"`{model}`"
    )
    card = Card(
        what=_what(receipt, metadata, shown),
        base_model="",
        relation="",
        library_name="corda-convert",
        tags=("corda", "covariance"),
        snippet=SNIPPET.replace("MODEL", json.dumps(model or "MODEL", ensure_ascii=False)),
        licence=licence.seen_from(model if model is not None and is_hub_id(model) else None),
    )
    return render_card(card, receipt, repo_id=None, folder_name=folder_name)


def _what(receipt: Mapping[str, Any], metadata: Mapping[str, str], model: str | None) -> str:
    source = receipt["options"].get("from_peft")
    origin = "" if model is None else f" of {model}"
    text = f" on {metadata['data']}" if metadata.get("data") else ""
    counts = [f"{int(metadata[key]):,} {key}" for key in ("samples", "tokens") if metadata.get(key, "").isdecimal()]
    sums = f" ({', '.join(counts)})" if counts else ""
    converted = f" They were converted from PEFT's covariance file `{source}`." if source else ""
    return (
        f"Covariances `C = X Xᵀ` of the inputs X of the Linear layers{origin}{text}{sums}, for CorDA.{converted} A layer that "
        "has the inputs of another one stands in the files' metadata, under `aliases`. `corda-convert decompose MODEL --cov` "
        "takes the folder, or its name on the Hub."
    )
