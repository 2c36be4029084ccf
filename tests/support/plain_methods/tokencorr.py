"""TokenCorrCompressor in plain loops."""

from __future__ import annotations

import torch

from support.plain_tower import PlainImage


def tokencorr(
    image: PlainImage, keep: int | None, sim_threshold: float, min_count: int, iqr_factor: float = 1.5, seed: int = 0
) -> list[int]:
    """Return the kept patches of one uncut image."""
    layer, total = len(image.attention) // 4, len(image.features)
    keys = image.keys[layer].flatten(1)[image.cls :]
    low, deep = image.looked_at(layer).mean(0), image.looked_at(image.feature_layer).mean(0).tolist()
    informative = 0
    for token in range(total):
        alike = sum(
            float(torch.cosine_similarity(keys[token], keys[other], dim=0)) >= sim_threshold
            for other in range(total)
            if other != token
        )
        informative += alike < min_count
    draws = torch.empty(total).exponential_(generator=torch.Generator().manual_seed(seed))
    drawn = sorted(range(total), key=lambda token: -float(low[token] / draws[token]))
    first, third = (float(torch.tensor(deep).quantile(share)) for share in (0.25, 0.75))
    outliers = [token for token in range(total) if deep[token] > third + iqr_factor * (third - first)]
    if keep is None:
        return sorted({*drawn[: max(1, informative)], *outliers})
    sequence = sorted(outliers, key=lambda token: -deep[token]) + [token for token in drawn if token not in outliers]
    return sorted(sequence[:keep])
