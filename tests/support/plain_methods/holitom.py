"""HoliTom in plain loops."""

from __future__ import annotations

from itertools import product

from torch import Tensor

from support.plain_methods.video_clusters import cosine, highest, in_proportion, mean, nearest, peaks


def holitom(
    video: Tensor, attention: Tensor, keep: int, merges_patches: bool, tau: float = 0.8, beta: float = 0.6
) -> dict[int, Tensor]:
    """Return the kept tokens of `video [frames, tokens, dim]` and their values; windows by trying all of them."""
    frames, tokens = video.shape[:2]
    x = video.double()
    still = [[cosine(x[f, i], x[f + 1, i]) > tau for i in range(tokens)] for f in range(frames - 1)]

    def places(window: range) -> list[int]:
        return [i for i in range(tokens) if len(window) > 1 and all(still[f][i] for f in window[:-1])]

    best: tuple[int, list[range]] = (-1, [])
    for cuts in product((False, True), repeat=frames - 1):
        ends = [f + 1 for f, cut in enumerate(cuts) if cut] + [frames]
        windows = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        saved = sum(len(places(window)) * (len(window) - 1) for window in windows)
        # Of equally good ones the shortest last window, then the shortest before it.
        if saved > best[0] or (saved == best[0] and _lengths(windows) < _lengths(best[1])):
            best = saved, windows
    windows = best[1]
    fixed = [places(window) for window in windows]
    moving = {f: [i for i in range(tokens) if i not in fixed[w]] for w, window in enumerate(windows) for f in window}
    sizes = [len(part) for part in fixed] + [len(moving[f]) for f in range(frames)]
    counts = in_proportion(min(keep, sum(sizes)), sizes)
    kept: dict[int, Tensor] = {}
    for window, part, count in zip(windows, fixed, counts, strict=False):
        if not count:
            continue
        values = [mean([x[f, i] for f in window]) for i in part]
        centres = peaks(values, min(7, count), count)
        members: list[list[Tensor]] = [[] for _ in centres]
        for k, value in enumerate(values):
            if k not in centres:
                members[nearest(value, [values[c] for c in centres])].append(value)
        for centre, others in zip(centres, members, strict=True):
            own = values[centre]
            value = beta * own + (1 - beta) * mean(others) if others else own
            kept[window[0] * tokens + part[centre]] = value.to(video.dtype)
    for f in range(frames):
        for k in highest([float(attention[f, i]) for i in moving[f]], counts[len(windows) + f]):
            kept[f * tokens + moving[f][k]] = video[f, moving[f][k]]
    return dict(sorted(kept.items()))


def _lengths(windows: list[range]) -> list[int]:
    return [len(window) for window in reversed(windows)]
