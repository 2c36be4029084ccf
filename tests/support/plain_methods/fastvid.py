"""FastVID in the form for Qwen, in plain loops."""

from __future__ import annotations

from torch import Tensor

from support.plain_methods.video_clusters import cosine, highest, mean, peaks, scenes, within_room


def fastvid(
    video: Tensor,
    attention: Tensor,
    keep: int,
    merges_patches: bool,
    scenes_at_least: int = 8,
    tau: float = 0.84,
    ignore: float = 0.95,
    context: float = 0.4,
    step: int = 4,
    beta: float = 0.6,
) -> dict[int, Tensor]:
    """Return the kept tokens of `video [frames, tokens, dim]` and their values."""
    frames, tokens = video.shape[:2]
    x = video.double()
    alike = [cosine(x[f].mean(0), x[f + 1].mean(0)) for f in range(frames - 1)]
    cuts = set(sorted(range(frames - 1), key=lambda f: (alike[f], f))[: scenes_at_least - 1])
    parts = scenes(alike, cuts | {f for f, value in enumerate(alike) if value < tau})
    shown_of = [[f for f in part if f == part[-1] or alike[f] < ignore][::-1] for part in parts]
    totals = within_room(keep, [len(part) for part in parts], [len(shown) * tokens for shown in shown_of])
    kept: dict[int, Tensor] = {}
    for scene, shown, total in zip(parts, shown_of, totals, strict=True):
        if not total:
            continue
        anchors = shown[::step]
        centres_in_all = min(max(round(total * context), 1), total)
        centres_of = {
            f: min(centres_in_all // len(anchors) + (rank < centres_in_all % len(anchors)), max(1, tokens // 2))
            for rank, f in enumerate(anchors)
        }
        left = total - sum(centres_of.values())
        salient: dict[int, list[int]] = {f: [] for f in scene}
        room = {f: tokens - centres_of.get(f, 0) for f in shown}
        counts = dict.fromkeys(shown, 0)
        while left:
            # One after the other, the last frames first, to those that have least.
            open_frames = [f for f in shown if counts[f] < room[f]]
            least = min(counts[f] for f in open_frames)
            counts[next(f for f in open_frames if counts[f] == least)] += 1
            left -= 1
        for f in shown:
            salient[f] = highest(attention[f].tolist(), counts[f])
            kept.update({f * tokens + i: video[f, i] for i in salient[f]})
        pool = [(f, i) for f in scene for i in range(tokens) if i not in salient[f]]
        for f in anchors:
            if not centres_of[f]:
                continue
            free = [i for i in range(tokens) if i not in salient[f]]
            chosen = [free[k] for k in peaks([x[f, i] for i in free], min(4, len(free)), centres_of[f])]
            members: list[list[Tensor]] = [[] for _ in chosen]
            for g, i in pool:
                if g != f or i not in chosen:
                    cosines = [cosine(x[g, i], x[f, c]) for c in chosen]
                    members[cosines.index(max(cosines))].append(x[g, i])
            for c, others in zip(chosen, members, strict=True):
                weight = max(1 / (len(others) + 1), beta)
                value = weight * x[f, c] + (1 - weight) * mean(others) if others else x[f, c]
                kept[f * tokens + c] = value.to(video.dtype)
    return dict(sorted(kept.items()))
