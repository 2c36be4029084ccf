"""A model that lacks what the hooks rely on is refused at `apply`, by name; facts of configurations agree with models."""

import pytest
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import vlmprune
from support.tiny_configs import MAKERS, TEXT, TOWER, tiny_config
from vlmprune.errors import UnsupportedFamilyError, UnsupportedMethodError
from vlmprune.patches.families.decoder import check_decoder
from vlmprune.patches.families.registry import FAMILIES, family_of_config, find_family
from vlmprune.patches.parts import Part, missing_parts


@pytest.fixture
def build():
    def make(model_type):
        return AutoModelForImageTextToText.from_config(tiny_config(model_type)).eval()

    return make


def taken_apart(model, path, argument=None):
    """Take away what lies at `path`, or let it take one argument less."""
    *steps, name = path.split(".")
    parent = model
    for step in steps:
        parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
    if argument is None:
        delattr(parent, name)
        return
    part = getattr(parent, name)
    if isinstance(part, nn.Module):
        part.__class__ = type(type(part).__name__, (type(part),), {"forward": lambda self, **renamed: None})
    else:
        setattr(parent, name, lambda **renamed: None)


@pytest.mark.parametrize("model_type", MAKERS)
def test_every_family_has_all_parts(build, model_type):
    family = find_family(build(model_type))
    family.check()
    family.check_tower()
    check_decoder(family.language_model, range(family.decoder_layers), "fastv")


@pytest.mark.parametrize(
    ("model_type", "path", "method"),
    [
        ("llava", "model", "random"),
        ("llava", "model.language_model", "random"),
        ("llava", "model.vision_tower", "random"),
        ("llava", "model.vision_tower.encoder.layers.1.self_attn.k_proj", "fastervlm"),
        ("llava", "model.language_model.rotary_emb", "fastv"),
        ("llava", "model.language_model.layers.2.self_attn.q_proj", "fastv"),
        ("llava", "model.language_model.layers.1.input_layernorm", "pyramiddrop"),
        ("qwen2_5_vl", "model.visual", "random"),
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv", "todre"),
        ("qwen2_5_vl", "model.visual.window_size", "todre"),
        ("qwen3_vl", "model.visual.merger", "todre"),
    ],
)
def test_a_missing_part_is_named(build, model_type, path, method):
    model = build(model_type)
    taken_apart(model, path)
    with pytest.raises((UnsupportedFamilyError, UnsupportedMethodError), match=f"no attribute '{path.split('.')[-1]}'"):
        vlmprune.apply(model, method, keep=0.8)
    assert "_vlmprune" not in model.__dict__
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "path", "argument", "method"),
    [
        ("llava", "model", "pixel_values", "random"),
        ("llava", "model.language_model", "attention_mask", "random"),
        ("llava", "model.language_model.layers.2", "position_embeddings", "fastv"),
        ("llava_next", "model.get_image_features", "image_sizes", "random"),
        ("qwen2_vl", "model.get_video_features", "video_grid_thw", "random"),
        ("qwen2_vl", "model.visual.blocks.1.attn", "cu_seqlens", "todre"),
        ("qwen3_vl", "model.language_model", "deepstack_visual_embeds", "random"),
    ],
)
def test_a_missing_argument_is_named(build, model_type, path, argument, method):
    model = build(model_type)
    taken_apart(model, path, argument)
    with pytest.raises((UnsupportedFamilyError, UnsupportedMethodError), match=f"takes no argument '{argument}'"):
        vlmprune.apply(model, method, keep=0.8)
    assert "_vlmprune" not in model.__dict__


def test_methods_that_do_not_read_the_tower_do_not_ask_for_its_layers(build):
    model = build("llava")
    taken_apart(model, "model.vision_tower.encoder")
    vlmprune.apply(model, "random", keep=0.8)
    vlmprune.remove(model)


def test_all_that_is_missing_is_named_at_once():
    class Toy:
        numbers = (1, 2)

        def call(self, known):
            pass

    parts = (Part("numbers.*.real"), Part("numbers.*.gone"), Part("call", ("known", "lost")), Part("nothing.at.all"))
    missing = missing_parts(Toy(), parts)
    assert len(missing) == 3
    assert all(word in "; ".join(missing) for word in ("'gone'", "'lost'", "'nothing'"))


def test_every_model_type_has_its_class():
    for family in FAMILIES:
        for model_type in family.model_types:
            assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] in family.model_classes
            assert family_of_config(tiny_config(model_type)) is family


@pytest.mark.parametrize(
    ("kind", "has_cls"), [("clip_vision_model", True), ("siglip_vision_model", False), ("mlcd_vision_model", True)]
)
def test_the_cls_token_of_a_tower_follows_from_its_configuration(kind, has_cls):
    config = LlavaConfig(vision_config={"model_type": kind, **TOWER}, text_config={"model_type": "llama", **TEXT})
    model = LlavaForConditionalGeneration(config)
    family = find_family(model)
    family.check()
    assert family.tower_facts.has_cls == has_cls
    config.vision_config.model_type = "clip_vision_model" if not has_cls else "other"
    with pytest.raises(UnsupportedFamilyError, match="CLS token"):
        vlmprune.apply(model, "random")
