"""How much a model needs each head of its first decoder layer, measured on pictures without labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.eval.accuracy.prompts import Prompt, data_checksum, read_prompts
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.patches.families.registry import find_family

Layers = Literal["first", "all"]


class CalibrationError(VlmpruneError, ValueError):
    """Weights cannot be measured on these prompts."""


@dataclass(frozen=True)
class Calibration:
    """Weights of the heads, and what they were measured on.

    Attributes:
        head_weights: one a head, summing to 1.
        divergence: mean KL(whole model || model without the head) per head, in nats.
        layers: the layers in which a head was taken out.
    """

    head_weights: tuple[float, ...]
    divergence: tuple[float, ...]
    layers: Layers


def run_calibration(loaded: LoadedModel, data: Path, out: Path, limit: int | None, layers: Layers) -> Calibration:
    """Measure the weights of the heads and write them to `out`, as `HAWK(head_weights=out)` reads them.

    One head after the other is taken out, its output set to 0. Its weight is how far that moves what the model expects
    next, the divergence of the next-token distributions at every token behind the last picture, mean over tokens and then
    over prompts; the weights sum to 1. The paper takes heads out too, and weighs them by the loss of accuracy on labelled
    benchmarks, in layers that it does not name.

    Args:
        loaded: the model.
        data: a folder of pictures, or a JSONL file of prompts (see `read_prompts`).
        out: the file to write.
        limit: prompts that are used at most.
        layers: "first" takes a head out of the first layer, whose scores the weights are for; "all" out of every layer.

    Raises:
        PromptDataError: the pictures or prompts cannot be used.
        CalibrationError: a prompt shows no picture, or no head makes a difference.
    """
    prompts = read_prompts(data, limit)
    totals: Tensor | None = None
    for prompt in prompts:
        found = head_divergences(loaded.model, _inputs(loaded, prompt), layers)
        totals = found if totals is None else totals + found
    assert totals is not None
    divergence = totals / len(prompts)
    if not float(divergence.sum()) > 0:
        raise CalibrationError(f"No head of {loaded.source!r} makes a difference on {str(data)!r}.")
    weights = divergence / divergence.sum()
    result = Calibration(tuple(weights.tolist()), tuple(divergence.tolist()), layers)
    content = {
        "head_weights": result.head_weights,
        "divergence": result.divergence,
        "layers": layers,
        "model": loaded.describe(),
        "data": data_checksum(prompts),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return result


@torch.no_grad()
def head_divergences(model: Any, inputs: dict[str, Tensor], layers: Layers) -> Tensor:
    """Return KL(whole || without a head) for every head, float64 `[heads]` on the CPU.

    Args:
        model: the unpruned model.
        inputs: one prompt with a picture.
        layers: see `run_calibration`.

    Raises:
        CalibrationError: the prompt shows no picture, or nothing stands behind it.
    """
    family = find_family(model)
    visual = inputs["input_ids"][0] == family.placeholder_id("image")
    behind = len(visual) - 1 - int(visual.nonzero()[-1]) if bool(visual.any()) else 0
    if not behind:
        raise CalibrationError("A prompt for calibration must show a picture and have text behind it.")
    heads = int(family.config.get_text_config().num_attention_heads)
    decoder: Any = family.language_model
    chosen = [layer.self_attn.o_proj for layer in (decoder.layers[:1] if layers == "first" else decoder.layers)]

    def expected() -> Tensor:
        logits = model(**inputs, use_cache=False).logits[0, -behind:]
        return logits.double().log_softmax(-1).cpu()

    whole, found = expected(), []
    for head in range(heads):
        with without_head(chosen, head, heads):
            found.append((whole.exp() * (whole - expected())).sum(-1).mean().clamp(min=0))
    return torch.stack(found)


@contextmanager
def without_head(projections: list[nn.Module], head: int, heads: int) -> Iterator[None]:
    """Set one head's output to 0 where `projections` take it."""

    def blank(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states = args[0].unflatten(-1, (heads, -1)).clone()
        states[..., head, :] = 0
        return (states.flatten(-2), *args[1:])

    handles = [projection.register_forward_pre_hook(blank) for projection in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs(loaded: LoadedModel, prompt: Prompt) -> dict[str, Tensor]:
    content = [*({"type": "image"} for _ in prompt.images), {"type": "text", "text": prompt.text}]
    text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [Image.open(path).convert("RGB") for path in prompt.images] or None
    made = loaded.processor(text=[text], images=pictures, return_tensors="pt")
    return dict(made.to(loaded.model.device, loaded.model.dtype))
