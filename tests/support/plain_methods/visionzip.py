"""VisionZip in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_tower import PlainImage


def visionzip(
    image: PlainImage, keep: int, contextual: float = 10 / 64, merge_at: str | None = None, cls_token: bool = True
) -> tuple[list[int], Tensor]:
    """Return the kept patches of one uncut image and what the language model gets in their places."""
    layer, total = image.feature_layer, len(image.features)
    scores = image.looked_at(layer).sum(0).tolist()
    keys = image.keys[layer].mean(1)[image.cls :]
    number = min(max(1, round(keep * contextual)), keep - 1) if keep > 1 else 0
    sends_cls = bool(image.cls) and cls_token and keep - number >= 2
    ranked = sorted(range(total), key=lambda token: -scores[token])
    dominant = sorted(ranked[: keep - number - sends_cls])
    rest = [token for token in range(total) if token not in dominant]
    values = {token: image.features[token] for token in dominant}
    if number:
        step = max(1, len(rest) // number)
        targets = rest[::step][:number]
        members: dict[int, list[int]] = {target: [] for target in targets}
        for token in rest:
            if token not in members:
                cosines = [float(torch.cosine_similarity(keys[token], keys[target], dim=0)) for target in targets]
                members[targets[cosines.index(max(cosines))]].append(token)
        in_tower = bool(image.cls) if merge_at is None else merge_at == "tower"
        merged_from = image.states[image.cls :] if in_tower else image.features
        for target, others in members.items():
            value = merged_from[target] + (merged_from[others].mean(0) if others else 0)
            values[target] = image.project(value) if in_tower else value
        if sends_cls:
            values[next(token for token in rest if token not in members)] = image.project(image.states[0])
    kept = sorted(values)
    return kept, torch.stack([values[token] for token in kept])
