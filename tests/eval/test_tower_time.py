"""The measurement of the vision tower alone."""

import torch

from support.deeper_tower import deeper_tower
from support.families import qwen2_vl
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.eval.speed.tower import measure_towers, tower_config, tower_table
from vlmprune.methods import ToMe


def test_the_full_tower_and_a_method():
    model = deeper_tower(LLAVA_CLIP_GQA).build(torch.float32)
    full, tome = measure_towers(model, [ToMe(keep=0.5)], "float32", 0.0)
    assert (full.method, tome.method, tome.keep) == ("full", "tome", 0.5)
    assert tome.gflops < full.gflops
    assert full.speedup["median"] == 1.0
    assert tome.rounds == full.rounds >= 3
    assert tower_table([full, tome]).row_count == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tower_over_packed_pictures():
    model = deeper_tower(qwen2_vl.CASES[0]).build(torch.float32)
    full, tome = measure_towers(model, [ToMe(keep=0.6)], "float32", 0.0, side=16)
    assert tome.gflops < full.gflops


def test_what_is_timed_runs_on_fewer_tokens():
    model = deeper_tower(LLAVA_CLIP_GQA).build(torch.float32)
    widths = set()
    block = model.model.vision_tower.encoder.layers[2]
    handle = block.mlp.register_forward_hook(lambda module, args, output: widths.add(args[0].shape[1]))
    measure_towers(model, [ToMe(keep=0.5)], "float32", 0.0)
    handle.remove()
    assert len(widths) == 2


def test_a_preset_keeps_its_tower():
    config = tower_config("llava-1.5-7b")
    assert config.vision_config.num_hidden_layers == 24
    assert config.get_text_config().num_hidden_layers == 1
