"""SCOPE in plain loops."""

from __future__ import annotations

import torch

from support.plain_tower import PlainImage


def scope(image: PlainImage, keep: int, alpha: float = 1.0, combined: str = "multi") -> list[int]:
    """Return the kept patches of one image."""
    features = torch.nn.functional.normalize(image.states[image.cls :], dim=-1).double()
    cosines = (features @ features.T).tolist()
    saliency = (image.looked_at(image.feature_layer).sum(0) ** alpha).tolist()
    total = len(cosines)
    cover, kept = [0.0] * total, []
    for _ in range(keep):
        best, best_score = -1, -1.0
        for token in range(total):
            gain = sum(max(0.0, cosines[other][token] - cover[other]) for other in range(total))
            score = gain * saliency[token] if combined == "multi" else gain + saliency[token]
            if token not in kept and score > best_score:
                best, best_score = token, score
        kept.append(best)
        cover = [max(cover[other], cosines[other][best]) for other in range(total)]
    return sorted(kept)
