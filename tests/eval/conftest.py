from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", "/tmp/vlmprune-test-datasets")

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    *("USER", "ASSISTANT", ":", "?", "what", "colour", "is", "the", "there", "a", "how", "many", "yes", "no"),
    *("circle", "square", "ring", "red", "green", "blue", "one", "two", "three"),
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }} : {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def build_processor() -> LlavaProcessor:
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = CLIPImageProcessor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=False
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_config(**text: object) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        projection_dim=32,
    )
    language = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **text,
    )
    return LlavaConfig(vision_config=vision, text_config=language, image_token_index=4, image_seq_length=64)


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config()).eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def random_image(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Makers of a tiny random LLaVA, its processor, configurations and pictures."""
    return SimpleNamespace(model=build_model, processor=build_processor, config=build_config, image=random_image)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("tasks")
    rows = 6
    table = datasets.Dataset.from_dict(
        {
            "image": [random_image(i) for i in range(rows)],
            "question": ["what colour is the circle ?", "is there a red ring ?", "how many square ?"] * 2,
            "answer": ["red", "yes", "two"] * 2,
        }
    ).cast_column("image", datasets.Image())
    table.to_parquet(folder / "items.parquet")
    (folder / "toy.yaml").write_text(TOY_TASK)
    (folder / "toy_utils.py").write_text(TOY_UTILS)
    (folder / "toy_choice.yaml").write_text(TOY_CHOICE)
    (folder / "toy_pair.yaml").write_text(
        TOY_TASK.replace("task: toy", "task: toy_pair").replace("picture", "pictures")
    )
    return folder


TOY_TASK = """\
task: toy
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: items.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function toy_utils.picture
doc_to_text: question
doc_to_target: answer
process_results: !function toy_utils.score
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

TOY_CHOICE = """\
task: toy_choice
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: items.parquet
test_split: test
output_type: multiple_choice
doc_to_visual: !function toy_utils.picture
doc_to_text: question
doc_to_choice: ["red", "yes", "two"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

TOY_UTILS = """\
def picture(doc):
    return [doc["image"]]


def pictures(doc):
    return [doc["image"], doc["image"].rotate(90)]


def score(doc, answers):
    return {"exact_match": float(answers[0].strip() == doc["answer"])}
"""
