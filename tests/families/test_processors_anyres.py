"""The real processors of LLaVA-NeXT and LLaVA-OneVision on photographs of many sizes, through `generate`."""

from functools import lru_cache

import pytest
import torch
from PIL import Image
from skimage import data
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

import vlmprune
from support.families.anyres_case import finish
from support.families.llava_next import LLAVA_NEXT
from support.families.llava_onevision import LLAVA_ONEVISION, VIDEO_TOKEN
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER

WORDS = "what is left right of the cat how many in these two pictures"
QUESTION = "<image> what is left of the cat"
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@lru_cache(maxsize=1)
def tokenizer():
    words = ["<pad>", "<s>", "<unk>", *WORDS.split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {"<video>": VIDEO_TOKEN, "<image>": IMAGE_TOKEN}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
    )


def next_processor(config):
    tile = config.vision_config.image_size
    images = LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def onevision_processor(config):
    tile = config.vision_config.image_size
    square = {"height": tile, "width": tile}
    images = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=config.image_grid_pinpoints)
    return LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(tile // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
    )


SETTINGS = {"next": (LLAVA_NEXT, next_processor), "onevision": (LLAVA_ONEVISION, onevision_processor)}


def photographs():
    """Return pairs of photographs: colour, grey and with alpha; landscape, portrait, square, strips, one pixel off."""
    colour = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.logo()]
    grey = [data.camera(), data.page(), data.text(), data.coins(), data.moon()]
    pictures = [Image.fromarray(array) for array in (*colour, *grey)]
    astronaut, rocket = Image.fromarray(colour[0]), Image.fromarray(colour[3])
    shapes = [(512, 511), (511, 512), (333, 500), (40, 512), (512, 30), (7, 9)]
    pictures += [astronaut.crop((0, 0, *shape)) for shape in shapes]
    pictures += [rocket.rotate(90, expand=True), rocket.resize((200, 100))]
    return list(zip(pictures[::2], pictures[1::2], strict=True))


def processed(processor, images, texts):
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def placeholders(inputs):
    return (inputs["input_ids"] == IMAGE_TOKEN).sum(1).tolist()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", ["hired", "globalcom2"])
def test_photographs_of_many_sizes(method, setting):
    case, build_processor = setting
    model = case.build(torch.float32)
    processor = build_processor(model.config)
    cuts = set()
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        for pair in photographs():
            inputs = processed(processor, list(pair), [QUESTION, f"{QUESTION} in the pictures"])
            generated = model.generate(**inputs, **GREEDY)
            images = vlmprune.last_run(model).images
            assert [image.total for image in images] == placeholders(inputs)
            assert [len(image.kept) for image in images] == [round(image.total / 4) for image in images]
            cuts |= {tuple(size) for size in inputs["image_sizes"].tolist()}
            text = [QUESTION, f"{QUESTION} in the pictures"]
            for row, picture in enumerate(pair):
                alone = processed(processor, [picture], [text[row]])
                assert generated[row, -4:].tolist() == model.generate(**alone, **GREEDY)[0, -4:].tolist()
                assert vlmprune.last_run(model).images[0].kept.tolist() == images[row].kept.tolist()
    assert len(cuts) > 12


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_keeping_everything_changes_nothing(setting):
    case, build_processor = setting
    model = case.build(torch.float32)
    processor = build_processor(model.config)
    for pair in photographs()[:3]:
        inputs = processed(processor, list(pair), [QUESTION, QUESTION])
        with torch.no_grad():
            expected = model(**inputs).logits
            with vlmprune.pruned(model, "hired", keep=1.0):
                assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", ["hired", "globalcom2", "divprune"])
def test_several_images_in_a_prompt_of_onevision(method):
    model = LLAVA_ONEVISION.build(torch.float32)
    processor = onevision_processor(model.config)
    (first, second), (third, _) = photographs()[:2]
    texts = ["<image> <image> what is in these two pictures", QUESTION]
    inputs = processed(processor, [[first, second], [third]], texts)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        model.generate(**inputs, **GREEDY)
        images = vlmprune.last_run(model).images
    assert [image.batch_index for image in images] == [0, 0, 1]
    assert [image.total for image in images[:2]] == [26, 26]
    assert images[2].total == placeholders(inputs)[1] > 26


@pytest.mark.parametrize("method", ["random", "uniform", "divprune"])
def test_a_video_of_onevision(method):
    model = LLAVA_ONEVISION.build(torch.float32)
    processor = onevision_processor(model.config)
    frames = torch.stack(
        [torch.from_numpy(data.chelsea()[i : i + 280, : 400 + i]).movedim(-1, 0)[:, :, :400] for i in range(5)]
    )
    inputs = processor(videos=[frames], text=["<video> what is left"], return_tensors="pt", do_sample_frames=False)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        model.generate(**inputs, **GREEDY)
        [video] = vlmprune.last_run(model).images
    assert video.total == int((inputs["input_ids"] == VIDEO_TOKEN).sum()) == 5 * 9 + 1
    assert len(video.kept) == round(video.total / 4)


@lru_cache(maxsize=1)
def next_of_true_geometry():
    """Tiles of 336 pixels and patches of 14, as published; everything else tiny."""
    tower = {**TOWER, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14, projection_dim=16).to_dict(),
        text_config=LlamaConfig(
            **{**LLAMA_GQA.to_dict(), "num_hidden_layers": 2, "max_position_embeddings": 8192}
        ).to_dict(),
        image_token_index=IMAGE_TOKEN,
    )
    return finish(LlavaNextForConditionalGeneration(config), torch.float32)


def test_published_geometry_of_llava_next():
    model = next_of_true_geometry()
    processor = next_processor(model.config)
    pictures = [Image.fromarray(data.astronaut()), Image.fromarray(data.text())]
    inputs = processed(processor, pictures, [QUESTION, QUESTION])
    with torch.no_grad(), vlmprune.pruned(model, "hired", keep=0.1):
        model.generate(**inputs, **GREEDY)
        images = vlmprune.last_run(model).images
    assert [image.total for image in images] == placeholders(inputs)
    assert images[0].total == 2928
    assert [len(image.kept) for image in images] == [round(0.1 * image.total) for image in images]
