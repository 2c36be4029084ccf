"""The stages of VisionDrop inside the language model, in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.plain_language import PlainRow, probe


def visiondrop_stages(
    layers: tuple[int, ...], counts: tuple[tuple[int, int], ...]
) -> Callable[[Any, int, PlainRow], None]:
    """Return the cuts."""

    def cut(model: Any, at: int, row: PlainRow) -> None:
        if at not in layers:
            return
        dominant, contextual = counts[layers.index(at)]
        attention, keys = probe(model, at, row)
        metric, new = keys.mean(1), []
        for own in row.images:
            received = attention[:, own][:, :, own].mean((0, 1)).tolist()
            best = sorted(range(len(own)), key=lambda token: -received[token])[:dominant]
            stay = [own[token] for token in sorted(best)]
            others = [token for token in own if token not in stay]
            step = max(1, len(others) // contextual)
            targets = others[::step][:contextual]
            joined: dict[int, list[int]] = {target: [] for target in targets}
            for token in others:
                if token not in targets:
                    cosines = [float(torch.cosine_similarity(metric[token], metric[t], dim=0)) for t in targets]
                    joined[targets[cosines.index(max(cosines))]].append(token)
            states = [row.hidden[token] for token in stay]
            for target, members in joined.items():
                states.append(row.hidden[target] + (row.hidden[members].mean(0) if members else 0))
            new.append((stay + targets, torch.stack(states)))
        row.replace(new, compact=True)

    return cut
