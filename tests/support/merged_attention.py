"""The attention that ToMe's reduced tower pays, worked out per patch from the plain tower."""

from __future__ import annotations

from itertools import pairwise

import torch

from support.plain_methods.tome import tome_tower
from vlmprune.methods import FasterVLM
from vlmprune.patches.families.registry import find_family


def shared_attention(model, family, method):
    """Return the tower's states on image "A" under a ToMe `method`, and the share of FasterVLM's attention of every patch.

    A patch gets its share of the attention to the token that it was merged into; places count the CLS token where there is one.
    """
    adapter = find_family(model)
    patches = family.tokens("A")
    counts = (patches, *method.plan(patches, adapter.tower_facts))
    removed = [before - after for before, after in pairwise(counts)]
    layer = FasterVLM().vision_signals(adapter.tower_facts)[0].layer
    states = tome_tower(adapter.vision_tower, family.image("A")["pixel_values"], removed)
    before, block = states[layer - 1], adapter.vision_layers[layer]
    with torch.no_grad():
        module, normed = block.self_attn, block.layer_norm1(torch.stack(before.values))
        query, key = (
            projection(normed).unflatten(-1, (module.num_heads, -1)) for projection in (module.q_proj, module.k_proj)
        )
        logits = torch.einsum("qhd,khd->hqk", query, key) * key.shape[-1] ** -0.5
        sizes = torch.tensor([float(len(members)) for members in before.members])
        attention = (logits + sizes.log()).softmax(-1).mean(0)
        received = attention[0] if adapter.tower_facts.has_cls else (attention * sizes[:, None]).sum(0) / sizes.sum()
    share = {
        member: float(score) / len(members)
        for score, members in zip(received, before.members, strict=True)
        for member in members
    }
    return states, share
