"""Cases of CATP: the greedy first stage, and both stages inside the language model on given states and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.input.catp import catp_order, catp_values, whole
from vlmprune.methods.layer.catp_stages import CATPStages, demonstration_scores, query_scores
from vlmprune.methods.layer_method import LayerBatch, TextSpans

LAYER, LAYERS = 2, 8


def catp_first(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One image and its text."""
    image, text = inputs["image"], inputs["text"]
    count = whole(len(image) * (1 - params["R"] / 2))
    order = catp_order(image, text, count, params["lambda1"])
    values, to_text = catp_values(image, text)
    cover, gains = torch.zeros(len(image)), []
    for pick in order.tolist():
        gains.append((values[pick] - cover).clamp(min=0).sum() + params["lambda1"] * to_text[pick])
        cover = torch.maximum(cover, values[pick])
    return {"order": order, "kept": order.sort().values, "gains": torch.stack(gains)}


def catp_inside(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One row: what is left of the demonstrations after layer K, and of the query image after the next."""
    query, everything = inputs["query_image_pos"], torch.arange(len(inputs["h_K"]))
    images = [*inputs["context_image_pos"].split(params["after_stage1"][:-1]), query]
    texts = inputs["context_all_pos"][~torch.isin(inputs["context_all_pos"], inputs["context_image_pos"])]
    words = torch.cat([texts, inputs["query_all_pos"][~torch.isin(inputs["query_all_pos"], query)]]).sort().values
    ends = [*(int(image.min()) for image in images[1:]), len(everything)]
    method = CATPStages(ratio=params["R"], layer=LAYER, lambda2=params["lambda2"])
    (earlier,) = method.layer_signals(LAYERS)
    memory: dict[Any, Any] = {}

    def cut(layer: int, hidden: Tensor, alive: list[Tensor]) -> list[Tensor]:
        # The engine does not show images of which nothing is left.
        shown = [number for number, columns in enumerate(alive) if len(columns)]
        visual, mine = torch.cat(images), [alive[number] for number in shown]
        batch = LayerBatch(
            layer=layer,
            layers=LAYERS,
            counts=tuple(map(len, mine)),
            budgets=(None,) * len(mine),
            rows=(0,) * len(mine),
            images=tuple(shown),
            totals=tuple(params["sizes"][number] for number in shown),
            entered=tuple(params["after_stage1"][number] for number in shown),
            columns=tuple(mine),
            text=tuple(_span(words, images[number], ends[number]) for number in shown),
            attention=inputs["attn_last_K"][torch.cat(mine)],
            signals={earlier: inputs["attn_last_Km1"][torch.cat(mine)]},
            hidden=hidden[None],
            valid=(~torch.isin(everything, visual) | torch.isin(everything, torch.cat(mine)))[None],
            memory=memory,
        )
        selection = method.select_at_layer(batch)
        left = list(alive)
        for number, columns, kept in zip(shown, mine, selection.kept.split(list(selection.counts)), strict=True):
            left[number] = columns[kept]
        return left

    after_first = cut(LAYER + 1, inputs["h_K"], images)
    after_second = cut(LAYER + 2, inputs["h_K1"], after_first)
    context = torch.cat([*after_first[:-1], texts])
    pool = inputs["context_image_pos"]
    return {
        "kept_context": torch.cat(after_first[:-1]),
        "kept_query": after_second[-1],
        "score_context": demonstration_scores(
            inputs["attn_last_K"][pool],
            inputs["attn_last_Km1"][pool],
            inputs["h_K"][pool],
            inputs["h_K"][inputs["query_all_pos"]],
            params["lambda2"],
        ),
        "score_query": query_scores(inputs["h_K1"][query], inputs["h_K1"][context]),
    }


def _span(words: Tensor, image: Tensor, end: int) -> TextSpans:
    behind = words[words > image.max()]
    return TextSpans(before=behind[:0], next=behind[behind < end], after=behind)


def catp(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of the first stage or of the later ones."""
    return (catp_first if params["stage"] == 1 else catp_inside)(params, inputs)


RUNS = {"catp": catp}
