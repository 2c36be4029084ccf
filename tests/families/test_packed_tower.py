"""Attention received in packed towers, against the probabilities that the host's own eager attention computes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_window_index

from support.tiny_models import spread_weights
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.calls import CallStack, TowerCall
from vlmprune.patches.hooks import HookSet
from vlmprune.patches.tower.packed import PackedTowerReader, WindowedTowerReader

SHARED = {"depth": 3, "num_heads": 2, "patch_size": 2}
# Windows of 3 x 3 merged tokens: 4 x 5 and 7 x 2 tokens have windows that are cut at both borders.
GRIDS = torch.tensor([[1, 8, 10], [1, 4, 4], [3, 6, 6], [1, 14, 4], [2, 2, 2]])


def qwen2():
    config = Qwen2VLVisionConfig(**SHARED, embed_dim=24, hidden_size=16)
    return Qwen2VisionTransformerPretrainedModel(config), PackedTowerReader()


def qwen25():
    config = Qwen2_5_VLVisionConfig(
        **SHARED, hidden_size=24, intermediate_size=16, out_hidden_size=16, window_size=12, fullatt_block_indexes=[1]
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config), WindowedTowerReader()


def qwen3():
    config = Qwen3VLVisionConfig(
        **SHARED,
        hidden_size=24,
        intermediate_size=16,
        out_hidden_size=16,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )
    return Qwen3VLVisionModel(config), PackedTowerReader()


def qwen35():
    config = Qwen3_5VisionConfig(
        **SHARED, hidden_size=24, intermediate_size=16, out_hidden_size=16, num_position_embeddings=64
    )
    return Qwen3_5VisionModel(config), PackedTowerReader()


@pytest.fixture(params=[qwen2, qwen25, qwen3, qwen35], ids=["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5"])
def tower_and_reader(request):
    torch.manual_seed(0)
    tower, reader = request.param()
    return spread_weights(tower).eval(), reader


def pixels(grids, dtype=torch.float32):
    patches = int(grids.prod(1).sum())
    return torch.randn(patches, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(1)).to(dtype)


def captured(tower, reader, layers, grids, kind="received_attention", **kwargs):
    """Signals of the layers, read while the tower runs."""
    family = SimpleNamespace(
        vision_tower=tower, vision_heads=2, vision_attention=lambda layer: tower.blocks[layer].attn
    )
    frames, hooks, frame = CallStack(), HookSet(), TowerCall()
    signals = [VisionSignal(kind, layer) for layer in layers]
    reader.install(family, signals, frames, hooks)
    frames.tower.append(frame)
    try:
        with torch.no_grad():
            tower(pixels(grids, tower.dtype), grid_thw=grids, **kwargs)
    finally:
        hooks.remove()
    return [reader.read(signal, frame) for signal in signals]


def eager_probabilities(tower, grids, monkeypatch):
    """Attention probabilities per layer and sequence, `[heads, queries, keys]`, of the host's eager attention."""
    seen, module = {}, sys.modules[type(tower).__module__]
    original = module.eager_attention_forward

    def forward(attention, *args, **kwargs):
        output, weights = original(attention, *args, **kwargs)
        seen.setdefault(id(attention), []).append(weights[0].float())
        return output, weights

    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", forward)
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            tower(pixels(grids, tower.dtype), grid_thw=grids)
        tower.set_attn_implementation("sdpa")
    return [seen[id(block.attn)] for block in tower.blocks]


def by_hand(probabilities, grids, order):
    """Column means per sequence, one patch after the other; then 2 x 2 groups, then raster order."""
    patches = torch.cat([sequence.mean(1).T for sequence in probabilities])
    tokens = patches.view(-1, 4, patches.shape[-1]).mean(1)
    result = torch.full_like(tokens, torch.nan)
    for place, token in enumerate(range(len(tokens)) if order is None else order.tolist()):
        result[token] = tokens[place]
    assert len(result) == int(grids.prod(1).sum()) // 4
    return result


def window_order(tower, grids):
    if not hasattr(tower, "window_size"):
        return None
    return get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)[0]


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], GRIDS[2:3]], ids=["several", "image", "video"])
def test_equals_the_hosts_eager_attention(tower_and_reader, grids, monkeypatch):
    tower, reader = tower_and_reader
    assert tower.config._attn_implementation == "sdpa"
    signals = captured(tower, reader, (0, 1, 2), grids)
    for signal, probabilities in zip(signals, eager_probabilities(tower, grids, monkeypatch), strict=True):
        assert signal.dtype == torch.float32
        expected = by_hand(probabilities, grids, window_order(tower, grids))
        torch.testing.assert_close(signal, expected, atol=1e-6, rtol=1e-5)


def attended(tower, block, monkeypatch):
    """Return queries and keys `[heads, patches, head_dim]` that a block hands to the host's eager attention, call by call."""
    seen, module = [], sys.modules[type(tower).__module__]
    original = module.eager_attention_forward

    def forward(attention, query, key, *args, **kwargs):
        if attention is tower.blocks[block].attn:
            seen.append((query[0], key[0]))
        return original(attention, query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", forward)
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            tower(pixels(GRIDS, tower.dtype), grid_thw=GRIDS)
        tower.set_attn_implementation("sdpa")
    return seen


def test_keys_are_those_that_the_host_hands_to_its_attention(tower_and_reader, monkeypatch):
    tower, reader = tower_and_reader
    (keys,) = captured(tower, reader, (1,), GRIDS, kind="keys")
    seen = [key for _, key in attended(tower, 1, monkeypatch)]
    # [heads, patches, head_dim] per sequence; four patches a token, heads side by side.
    patches = torch.cat([key.transpose(0, 1).flatten(1) for key in seen])
    order = window_order(tower, GRIDS)
    for place, token in enumerate(range(len(patches) // 4) if order is None else order.tolist()):
        torch.testing.assert_close(keys[token], patches[4 * place : 4 * place + 4].mean(0), atol=1e-6, rtol=1e-5)


def test_mean_query_of_a_frame_over_the_mean_keys_of_its_tokens(tower_and_reader, monkeypatch):
    tower, reader = tower_and_reader
    last = len(tower.blocks) - 1
    (signal,) = captured(tower, reader, (last,), GRIDS, kind="mean_query_attention")
    seen = attended(tower, last, monkeypatch)
    # One call a frame (a window, where the layer has windows), [heads, patches, head_dim].
    expected = []
    for query, key in seen:
        for token in range(key.shape[1] // 4):
            logits = [
                query.mean(1)[head] @ key[head, 4 * other : 4 * other + 4].mean(0) * query.shape[-1] ** -0.5
                for head in range(len(key))
                for other in range(key.shape[1] // 4)
            ]
            expected.append(torch.stack(logits).view(len(key), -1).softmax(-1)[:, token])
    order = window_order(tower, GRIDS)
    for place, token in enumerate(range(len(expected)) if order is None else order.tolist()):
        torch.testing.assert_close(signal[token], expected[place], atol=1e-6, rtol=1e-5)


def test_images_of_a_call_score_as_alone(tower_and_reader):
    tower, reader = tower_and_reader
    together = captured(tower, reader, (2,), GRIDS)[0]
    everything = pixels(GRIDS)
    start = 0
    for grid in GRIDS:
        count = int(grid.prod())
        frames, hooks, frame = CallStack(), HookSet(), TowerCall()
        family = SimpleNamespace(
            vision_tower=tower, vision_heads=2, vision_attention=lambda layer: tower.blocks[layer].attn
        )
        signal = VisionSignal("received_attention", 2)
        reader.install(family, [signal], frames, hooks)
        frames.tower.append(frame)
        with torch.no_grad():
            tower(everything[start : start + count], grid_thw=grid[None])
        hooks.remove()
        alone = reader.read(signal, frame)
        torch.testing.assert_close(together[start // 4 : (start + count) // 4], alone, atol=1e-6, rtol=1e-5)
        start += count


def test_windows_share_out_what_their_queries_give():
    tower, reader = qwen25()
    windowed, full = captured(tower, reader, (0, 1), GRIDS[:1])
    assert tower.fullatt_block_indexes == [1]
    # 4 x 5 tokens in windows of at most 3 x 3: rows 3 + 1, columns 3 + 2.
    for rows in (slice(0, 3), slice(3, 4)):
        for columns in (slice(0, 3), slice(3, 5)):
            window = windowed.view(4, 5, 2)[rows, columns]
            torch.testing.assert_close(window.sum((0, 1)) * 4, torch.ones(2))
    torch.testing.assert_close(full.sum(0) * 4, torch.ones(2))


def test_windows_that_the_caller_brings(monkeypatch):
    tower, reader = qwen25()
    expected = captured(tower, reader, (0, 1), GRIDS)
    order, bounds = get_vision_window_index(GRIDS, 2, tower.window_size, tower.patch_size)
    brought = captured(tower, reader, (0, 1), GRIDS, window_index=order, cu_window_seqlens=bounds)
    assert all(torch.equal(one, other) for one, other in zip(expected, brought, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_scores_in_fp32(tower_and_reader, dtype, monkeypatch):
    tower, reader = tower_and_reader
    tower.to(dtype)
    (signal,) = captured(tower, reader, (1,), GRIDS)
    assert signal.dtype == torch.float32
    assert signal.flatten().unique().numel() > 0.9 * signal.numel(), "half-precision scores would tie"
    probabilities = eager_probabilities(tower, GRIDS, monkeypatch)[1]
    expected = by_hand(probabilities, GRIDS, window_order(tower, GRIDS))
    torch.testing.assert_close(signal, expected, atol=5e-3, rtol=5e-2)


def test_no_square_matrix_of_all_patches(tower_and_reader):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen.add(tuple(result.shape))
            return result

    tower, reader = tower_and_reader
    with Shapes() as shapes:
        captured(tower, reader, (1,), GRIDS)
    total = int(GRIDS.prod(1).sum())
    assert not [shape for shape in shapes.seen if shape[-2:] == (total, total)]


@pytest.mark.parametrize("kind", ["cls_attention", "cls_logits"])
def test_there_is_no_cls_token(tower_and_reader, kind):
    tower, reader = tower_and_reader
    family = SimpleNamespace(
        vision_tower=tower, vision_heads=2, vision_attention=lambda layer: tower.blocks[layer].attn
    )
    with pytest.raises(UnsupportedMethodError, match="no CLS token"):
        reader.install(family, [VisionSignal(kind, 1)], CallStack(), HookSet())


def test_hooks_survive_a_deep_copy():
    import copy

    tower, reader = qwen2()
    expected = captured(tower, reader, (2,), GRIDS)[0]
    family = SimpleNamespace(
        vision_tower=tower, vision_heads=2, vision_attention=lambda layer: tower.blocks[layer].attn
    )
    frames, hooks = CallStack(), HookSet()
    signal = VisionSignal("received_attention", 2)
    reader.install(family, [signal], frames, hooks)
    other_tower, other_reader, other_frames = copy.deepcopy((tower, reader, frames))
    frame = TowerCall()
    other_frames.tower.append(frame)
    with torch.no_grad():
        other_tower(pixels(GRIDS), grid_thw=GRIDS)
    assert torch.equal(other_reader.read(signal, frame), expected)
    hooks.remove()
