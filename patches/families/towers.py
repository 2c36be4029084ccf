"""The vision tower of a class that no family knows, where it is of a known kind: CLIP, SigLIP, InternViT, or packed as Qwen's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmprune.methods.batch import TowerFacts

from ..parts import Part, missing_parts
from ..tower.cells import CellTowerReader
from ..tower.packed import PackedTowerReader, WindowedTowerReader
from ..tower.reader import TowerReader
from .facts import has_cls, state_layers
from .wrappers import without_wrappers

_NAMES = ("vision_tower", "vision_model", "visual")
_KNOWN = "CLIP, SigLIP, InternViT, or packed as Qwen's"
_TOLERANCE = 0.03


@dataclass(frozen=True)
class _Dense:
    """Where a kind of tower over equally large tiles has its layers, and what their attention is built of."""

    layers: str
    attention: str
    projections: tuple[str, str]
    output: str


_DENSE = (
    _Dense("encoder.layers", "self_attn", ("q_proj", "k_proj"), "out_proj"),
    _Dense("vision_model.encoder.layers", "self_attn", ("q_proj", "k_proj"), "out_proj"),
    _Dense("encoder.layer", "attention", ("q_norm", "k_norm"), "projection_layer"),
)
_PACKED_PARTS = (
    Part(arguments=("grid_thw",)),
    Part("spatial_merge_size"),
    # It merges patches that follow each other in its own order.
    Part("merger"),
    Part("blocks.*.attn", ("cu_seqlens", "position_embeddings")),
    Part("blocks.*.attn.qkv"),
    Part("blocks.*.attn.proj"),
    Part("blocks.*.attn.scaling"),
)


@dataclass(frozen=True, eq=False)
class FoundTower:
    """A tower whose attention can be read.

    Attributes:
        kind: "dense" over equally large tiles, "packed" over pictures of any size.
        path: from the multimodal model to it.
        layers: its layers.
        attention: name of a layer's attention.
        projections: children of the attention that give queries and keys, of a dense tower.
        facts: its facts; patches of a visual token are told by the layout where the tower is dense.
    """

    kind: Literal["dense", "packed"]
    path: str
    layers: nn.ModuleList
    attention: str
    projections: tuple[str, str]
    facts: TowerFacts

    def reader(self, tower: Any) -> TowerReader:
        """Return what reads it."""
        if self.kind == "dense":
            return CellTowerReader(round(self.facts.patches_per_token**0.5))
        windowed = getattr(tower, "fullatt_block_indexes", None) is not None
        return WindowedTowerReader() if windowed else PackedTowerReader()


def find_tower(multimodal_model: nn.Module, config: Any, tokens_of_tile: int | None) -> FoundTower | str:
    """Return the tower of a class, or in words why none is known.

    Every layer's attention is run on a few made-up tokens, and computed again from what would be read of it. The two must agree.

    Args:
        multimodal_model: the module that encodes images.
        config: the model's configuration.
        tokens_of_tile: visual tokens of a tile where tiles are equally large and of a known layout.
    """
    named = [name for name in _NAMES if isinstance(getattr(multimodal_model, name, None), nn.Module)]
    if len(named) != 1:
        return f"it has {len(named)} modules of the names {', '.join(_NAMES)}, of which one is needed"
    tower = without_wrappers(getattr(multimodal_model, named[0]))
    found = _packed(named[0], tower, config) or _dense(named[0], tower, config, tokens_of_tile)
    if isinstance(found, FoundTower):
        try:
            error = max(_reading_error(found, layer) for layer in range(len(found.layers)))
        except Exception as caught:
            # Whatever a class does that nobody knew of: it is not read.
            return f"its tower {type(tower).__name__} cannot be read: {type(caught).__name__}: {caught}"
        if not error < _TOLERANCE:
            return f"the attention of its tower {type(tower).__name__} is another than what is read gives (off by {error:.0%})"
    return found


def _packed(path: str, tower: Any, config: Any) -> FoundTower | None:
    if missing_parts(tower, _PACKED_PARTS):
        return None
    heads = getattr(tower.blocks[0].attn, "num_heads", None)
    if not isinstance(heads, int):
        return None
    depth = len(tower.blocks)
    facts = TowerFacts(depth, depth - 1, False, heads, int(tower.spatial_merge_size) ** 2)
    return FoundTower("packed", path, tower.blocks, "attn", ("qkv", "qkv"), facts)


def _dense(path: str, tower: Any, config: Any, tokens_of_tile: int | None) -> FoundTower | str:
    name = type(tower).__name__
    for kind in _DENSE:
        try:
            layers = tower.get_submodule(kind.layers)
        except AttributeError:
            continue
        parts = [Part(f"*.{kind.attention}.{part}") for part in (*kind.projections, "num_heads", "v_proj", kind.output)]
        if not isinstance(layers, nn.ModuleList) or missing_parts(layers, parts):
            continue
        if tokens_of_tile is None:
            return f"how the patches of its tower {name} become visual tokens is not known"
        vision = config.vision_config
        patches = (int(_number(vision.image_size)) // int(_number(vision.patch_size))) ** 2
        side = round((patches // tokens_of_tile) ** 0.5)
        if side**2 * tokens_of_tile != patches:
            return f"{patches} patches of its tower {name} become {tokens_of_tile} visual tokens, which are no square cells"
        deepest = len(layers) - 1
        if hasattr(config, "vision_feature_layer") or hasattr(config, "vision_feature_layers"):
            deepest = max(0, *state_layers(config))
        first: Any = without_wrappers(layers[0])
        heads = int(first.get_submodule(kind.attention).num_heads)
        cls = has_cls(config) or "internvl" in str(vision.model_type)
        facts = TowerFacts(len(layers), deepest, cls, heads, side**2)
        return FoundTower("dense", path, layers, kind.attention, kind.projections, facts)
    return f"its tower {name} is of no known kind ({_KNOWN})"


def _number(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def _reading_error(tower: FoundTower, layer: int) -> float:
    attention: Any = without_wrappers(without_wrappers(tower.layers[layer]).get_submodule(tower.attention))
    dense, heads = tower.kind == "dense", tower.facts.heads
    first = attention.v_proj if dense else attention.qkv
    weight: Tensor = first.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        if dense:
            kind = next(kind for kind in _DENSE if kind.projections == tower.projections)
            given = attention.forward(hidden_states=hidden[None])[0][0]
            query, key = attention.q_proj(hidden), attention.k_proj(hidden)
            if kind.projections != ("q_proj", "k_proj"):
                query, key = (
                    getattr(attention, name)(rows) for name, rows in zip(kind.projections, (query, key), strict=True)
                )
            query, key, value = (rows.unflatten(-1, (heads, -1)) for rows in (query, key, attention.v_proj(hidden)))
            scale, project = query.shape[-1] ** -0.5, getattr(attention, kind.output)
        else:
            query, key, value = attention.qkv(hidden).view(6, 3, heads, -1).unbind(1)
            angles = torch.randn(6, query.shape[-1] // 2, generator=generator).repeat(1, 2).to(hidden)
            bounds = torch.tensor([0, 6], dtype=torch.int32, device=hidden.device)
            tables = (angles.cos(), angles.sin())
            given = attention.forward(hidden, cu_seqlens=bounds, position_embeddings=tables, max_seqlen=6)
            query, key = PackedTowerReader().rotated(attention, query, key, *tables)
            scale, project = attention.scaling, attention.proj
        weights = (torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale).softmax(-1)
        read = project(torch.einsum("hqk,khd->qhd", weights, value.float()).flatten(1).to(weight.dtype))
    return float((given - read).float().norm() / given.float().norm())
