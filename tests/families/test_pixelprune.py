"""PixelPrune in the towers of the Qwen families, against the whole tower with what was dropped masked away."""

import sys

import pytest
import torch

import vlmprune
from support.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from support.merging import entering
from support.tiny_models import IMAGE_TOKEN, LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError, UnknownNameError, UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods import PixelPrune, ToMe

FAMILIES = [qwen2_vl.CASES[0], qwen2_5_vl.CASES[0], *qwen3_vl.CASES]
ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9]]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def flat(inputs, share=0.25, seed=0):
    """The inputs with pictures of a few flat areas, and something drawn on a share of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = inputs["pixel_values"].clone()
    begin = 0
    for frames, rows, columns in inputs["image_grid_thw"].tolist():
        tokens = torch.zeros(frames, rows // 2, columns // 2, 1)
        tokens[:, :, columns // 4 :] = 0.5
        tokens[:, rows // 4 :, :2] = -1.0
        values = tokens.flatten(0, 2).repeat_interleave(4, 0).expand(-1, pixels.shape[1]).clone()
        drawn = (torch.rand(len(values) // 4, generator=generator) < share).repeat_interleave(4)
        values[drawn] = torch.randn(int(drawn.sum()), pixels.shape[1], generator=generator)
        pixels[begin : begin + len(values)] = values
        begin += len(values)
    return {**inputs, "pixel_values": pixels}


def masked_tower(model, inputs, kept):
    """Features and deep features `[tokens, dim]` of a tower in which nothing attends to the patches of other tokens."""
    tower, calls = model.model.visual, []
    handles = [
        block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for handle in handles:
        handle.remove()
    order = torch.arange(len(kept))
    if hasattr(tower, "fullatt_block_indexes"):
        order = windows(inputs["image_grid_thw"], tower.window_size // 2 // tower.patch_size)
    patches = kept[order].repeat_interleave(4)
    hidden, deep = calls[0][0][0], []
    for number, (block, (_, kwargs)) in enumerate(zip(tower.blocks, calls, strict=True)):
        bounds = kwargs["cu_seqlens"]
        sequence = torch.bucketize(torch.arange(len(patches)), bounds[1:], right=True)
        seen = (sequence[:, None] == sequence) & patches
        hidden = hidden + attended(block, hidden, kwargs["position_embeddings"], seen)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if number in getattr(tower, "deepstack_visual_indexes", ()):
            deep.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(number)](hidden))
    features = torch.empty_like(tower.merger(hidden))
    features[order] = tower.merger(hidden)
    return features, deep


def windows(grids, side):
    """The raster place of the token at each place of the order by windows."""
    order, begin = [], 0
    for frames, rows, columns in grids.tolist():
        tokens = torch.arange(frames * rows * columns // 4).view(frames, rows // 2, columns // 2) + begin
        for row in range(0, rows // 2, side):
            for column in range(0, columns // 2, side):
                order.append(tokens[:, row : row + side, column : column + side].flatten())
        begin += tokens.numel()
    return torch.cat(order)


def attended(block, hidden, tables, seen):
    module = block.attn
    query, key, value = module.qkv(block.norm1(hidden)).unflatten(1, (3, module.num_heads, -1)).unbind(1)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
    query, key = rotate(query, key, *tables)
    logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return module.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))


@over_families
@pytest.mark.parametrize("keep", [None, 0.3, 5])
def test_the_tower_runs_on_what_is_kept_alone(family, keep):
    model, inputs = family.build(torch.float32), flat(family.inputs(ROWS))
    lengths = []
    handle = model.model.visual.blocks[-1].register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    with torch.no_grad(), vlmprune.pruned(model, PixelPrune(keep=keep)), entering(model) as entered:
        given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        features = torch.cat(list(model.model.get_image_features(**given).pooler_output))
        model(**inputs)
        images = vlmprune.last_run(model).images
    handle.remove()
    kept = torch.cat([torch.zeros(image.total, dtype=torch.bool).index_fill(0, image.kept, True) for image in images])
    assert 0 < kept.sum() < 0.7 * len(kept)
    with torch.no_grad():
        expected, deep = masked_tower(model, inputs, kept)
    assert lengths[0] == 4 * int(kept.sum())
    torch.testing.assert_close(features[kept], expected[kept], atol=2e-5, rtol=1e-4)
    if keep is not None:
        assert [len(image.kept) for image in images] == [
            keep if isinstance(keep, int) else round(keep * image.total) for image in images
        ]
    for plane, now in zip(deep, entered[0].get("deepstack_visual_embeds") or (), strict=True):
        torch.testing.assert_close(now, plane[kept], atol=2e-5, rtol=1e-4)


@over_families
def test_equal_patches_go_and_positions_stay(family):
    model, inputs = family.build(torch.float32), flat(family.inputs([[3, "large", 4]]), share=0.0)
    with torch.no_grad(), vlmprune.pruned(model, "pixelprune"), entering(model) as entered:
        model(**inputs)
        (image,) = vlmprune.last_run(model).images
    rows, columns = image.grid
    # Three areas: where each begins, and where the edges of two meet the prediction by the upper neighbour fails.
    assert len(image.kept) < rows + columns
    assert image.kept[0] == 0
    placeholders = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten().tolist()
    dropped = {place for number, place in enumerate(placeholders) if number not in image.kept.tolist()}
    stays = [place for place in range(inputs["input_ids"].shape[1]) if place not in dropped]
    whole = family.positions(model, inputs)[:, 0, stays]
    torch.testing.assert_close(entered[0]["position_ids"][-3:, 0].to(whole), whole)


def test_tolerance_scans_and_metrics():
    model, family = FAMILIES[1].build(torch.float32), FAMILIES[1]
    inputs = flat(family.inputs([[3, "large", 4]]), share=0.1)
    inputs["pixel_values"] += 0.01 * torch.rand_like(inputs["pixel_values"])
    counts = {}
    for name, parameters in {
        "exact": {},
        "tau": {"tau": 0.02},
        "mae": {"tau": 0.02, "metric": "mae"},
        "rmse": {"tau": 0.02, "metric": "rmse", "anchored": False},
        "raster": {"tau": 0.02, "scan": "raster"},
        "serpentine": {"tau": 0.02, "scan": "serpentine"},
    }.items():
        with torch.no_grad(), vlmprune.pruned(model, "pixelprune", **parameters):
            model(**inputs)
            (image,) = vlmprune.last_run(model).images
        counts[name] = len(image.kept)
    assert counts["exact"] == image.total
    assert all(count < 0.6 * image.total for name, count in counts.items() if name != "exact")


@over_families
def test_a_picture_without_equal_patches_is_left_alone(family):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        whole = model(**inputs).logits
        with vlmprune.pruned(model, "pixelprune"):
            logits = model(**inputs).logits
            assert all(len(image.kept) == image.total for image in vlmprune.last_run(model).images)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[valid], whole[valid])


def test_what_cannot_be_served_is_refused():
    family = FAMILIES[0]
    model, inputs = family.build(torch.float32), flat(family.inputs([[3, "A", 4], [2, "small"]]))
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad(), vlmprune.pruned(model, "pixelprune", keep=0.4):
        with (
            vlmprune.options(model, keep=[0.3, 0.5]),
            pytest.raises(UnsupportedCallError, match="one keep for all rows"),
        ):
            model(**inputs)
        encoded = model.model.get_image_features(**given)
        with vlmprune.options(model, keep=0.8), pytest.raises(UnsupportedCallError, match="with the same"):
            model(**others, mm_encoder_outputs={"image": encoded})
        with vlmprune.options(model, keep=1.0), pytest.raises(UnsupportedCallError, match="with the same keep"):
            model(**others, mm_encoder_outputs={"image": encoded})
        model(**inputs)
        with pytest.raises(UnsupportedMethodError, match="video"):
            model(**family.inputs([[3, "video", 4]]))
    with pytest.raises(UnsupportedMethodError, match="'tome' acts in"):
        vlmprune.apply(model, [PixelPrune(), ToMe(keep=0.9)])
    with pytest.raises(UnsupportedMethodError, match="packed patches"):
        vlmprune.apply(LLAVA_CLIP_GQA.build(torch.float32), "pixelprune")
    with pytest.raises(ParameterError, match="tau=2"):
        PixelPrune(tau=2.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'rmse'"):
        PixelPrune(metric="rms")
    with pytest.raises(UnknownNameError, match="tau="):
        vlmprune.apply(model, "pixelprune", threshold=0.1)
