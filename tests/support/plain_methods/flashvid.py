"""FlashVID in plain loops."""

from __future__ import annotations

import math

from torch import Tensor

from support.plain_methods.video_clusters import cosine, in_proportion, mean, nearest, peaks, scenes, spread


def flashvid(
    video: Tensor,
    attention: Tensor,
    keep: int,
    merges_patches: bool,
    temporal_threshold: float = 0.8,
    segment_threshold: float = 0.9,
    min_segments: int | None = None,
    alpha: float = 0.7,
) -> dict[int, Tensor]:
    """Return the kept tokens of `video [frames, tokens, dim]` and their values."""
    frames, tokens = video.shape[:2]
    x = video.double()
    alike = [cosine(x[f].mean(0), x[f + 1].mean(0)) for f in range(frames - 1)]
    cuts = {f for f, value in enumerate(alike) if value < segment_threshold}
    missing = (min_segments or (4 if merges_patches else 8)) - len(cuts) - 1
    cuts |= set(sorted(set(range(frames - 1)) - cuts, key=alike.__getitem__)[: max(0, missing)])
    budgets = spread(keep, frames)
    picks = [math.ceil(budget * alpha) for budget in budgets]
    kept: dict[int, Tensor] = {}
    for scene in scenes(alike, cuts):
        picked = {}
        for f in scene:
            weights = attention[f].double().tolist()
            if not merges_patches:
                middle = mean([token for g in scene for token in x[g]])
                weights = [weight * max(0.0, float(x[f, i] @ middle)) for i, weight in enumerate(weights)]
            chosen: list[int] = []
            for _ in range(picks[f]):
                reach = [
                    -math.inf
                    if i in chosen
                    else weights[i] * min(1 - cosine(x[f, i], x[f, j]) for j in (chosen or range(tokens)) if j != i)
                    for i in range(tokens)
                ]
                chosen.append(reach.index(max(reach)))
            picked[f] = set(chosen)
            kept.update({f * tokens + i: video[f, i] for i in chosen})
        members = {(f, i): [x[f, i]] for f in scene for i in range(tokens) if i not in picked[f]}
        joins = []
        for f in scene[1:]:
            free = [j for j in range(tokens) if j not in picked[f - 1]]
            for i in range(tokens):
                if i not in picked[f] and free:
                    most = max((cosine(x[f, i], x[f - 1, j]), -j) for j in free)
                    joins.append((most[0], f, i, -most[1]))
        wanted = sum(budgets[f] for f in scene)
        joins = [join for join in joins if join[0] > temporal_threshold]
        most_joins = len(scene) * tokens - wanted
        if len(joins) > most_joins:
            joins = sorted(joins, key=lambda join: (-join[0], join[1:]))[: max(0, most_joins - 1)]
        for _, f, i, j in sorted(joins, key=lambda join: -join[1]):
            members[f - 1, j] += members.pop((f, i))
        roots = [sorted(i for g, i in members if g == f) for f in scene]
        clusters = in_proportion(wanted - sum(picks[f] for f in scene), [len(part) for part in roots])
        for f, part, count in zip(scene, roots, clusters, strict=True):
            if count:
                values = [mean(members[f, i]) for i in part]
                centres = peaks(values, min(count, 7), count)
                groups = [
                    centres.index(k) if k in centres else nearest(value, [values[c] for c in centres])
                    for k, value in enumerate(values)
                ]
                for number, centre in enumerate(centres):
                    mine = [value for value, group in zip(values, groups, strict=True) if group == number]
                    kept[f * tokens + part[centre]] = mean(mine).to(video.dtype)
    return dict(sorted(kept.items()))
