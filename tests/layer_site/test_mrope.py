"""Staged dropping with 3-D positions and with features that the host adds in deeper layers, by hand."""

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask

from support.tiny_models import spread_weights
from vlmprune.layout import unknown_layout
from vlmprune.methods import FastV, PyramidDrop
from vlmprune.methods.pipeline import make_pipeline
from vlmprune.methods.visual_batch import TowerFacts
from vlmprune.patches.engine import PruningEngine
from vlmprune.patches.families.family import Family

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GRID = (1, 8, 12)


def qwen25():
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def qwen3():
    vision = {
        "depth": 4,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text = {**TEXT, "head_dim": 8}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


class BareQwen(Family):
    """Only what dropping inside the language model needs."""

    name = "Qwen"
    mrope = True

    @property
    def vision_tower(self):
        return self.model.model.visual

    @property
    def tower_facts(self):
        return TowerFacts(layers=2, feature_layer=1, has_cls=False)

    def layouts(self, visuals):
        return tuple(unknown_layout(count) for count in visuals.counts)


@pytest.fixture(params=[qwen25, qwen3], ids=["qwen2.5-vl", "qwen3-vl"])
def model(request):
    torch.manual_seed(0)
    return spread_weights(request.param()).eval()


def prompt(texts):
    """Rows of text, image, text; left padded."""
    merged = GRID[1] * GRID[2] // 4
    rows = []
    for before, after in texts:
        generator = torch.Generator().manual_seed(before * 17 + after)
        words = torch.randint(1, 80, (before + after,), generator=generator).tolist()
        rows.append([*words[:before], START, *[IMAGE] * merged, END, *words[before:]])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pixels = [
        torch.randn(GRID[1] * GRID[2], 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(before))
        for before, _ in texts
    ]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor([GRID] * len(texts)),
    }


def language_model_inputs(model, inputs):
    caught = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return caught[0]


def by_hand(model, inputs, record, row, compact, later):
    """Logits of one row at its alive tokens and the `later` ones."""
    language_model, given = model.model.language_model, language_model_inputs(model, inputs)
    total = inputs["input_ids"].shape[1]
    visual = inputs["input_ids"][row] == IMAGE
    text = inputs["attention_mask"][row].bool() & ~visual
    placeholders = visual.nonzero().flatten()
    (image,) = [image for image in record.images if image.batch_index == row]
    positions = given["position_ids"][-3:, row]
    extra = torch.arange(1, len(later) + 1)
    positions = torch.cat([positions, positions[:, -1:].max() + extra.expand(3, -1)], 1)
    table = torch.cat([given["inputs_embeds"][row], model.get_input_embeddings()(later)])
    deep = given.get("deepstack_visual_embeds") or []
    first = sum(int((inputs["input_ids"][other] == IMAGE).sum()) for other in range(row))
    columns = torch.arange(len(table))
    hidden = table
    for layer, module in enumerate(language_model.layers):
        kept = [stage for start, stage in image.stages if start <= layer][-1]
        alive = (
            torch.cat([text.nonzero().flatten(), placeholders[kept], total + torch.arange(len(later))]).sort().values
        )
        hidden = hidden[torch.isin(columns, alive)]
        columns = alive
        ids = positions[:, columns]
        if compact:
            gone = torch.ones(len(table), dtype=torch.int64)
            gone[columns] = 0
            gone[: (inputs["attention_mask"][row] == 0).sum()] = 0
            ids = ids - gone.cumsum(0)[columns]
        hidden = module(
            hidden[None],
            attention_mask=create_causal_mask(language_model.config, hidden[None], None, None),
            position_embeddings=language_model.rotary_emb(hidden[None], ids[:, None]),
        )[0]
        if layer < len(deep):
            hidden = hidden.clone()
            hidden[torch.isin(columns, placeholders)] += deep[layer][first + kept]
    return columns, model.lm_head(language_model.norm(hidden))


@pytest.mark.parametrize(
    ("method", "positions"),
    [
        (PyramidDrop(layers=(1, 2, 4), ratios=(0.5, 0.25, 0.125)), None),
        (PyramidDrop(layers=(2, 4), ratios=(0.5, 0.25)), "compact"),
        (FastV(layer=2, ratio=0.6), None),
        (PyramidDrop(layers=(3, 5), ratios=(0.5, 0.25)), None),
    ],
    ids=["early", "compact", "fastv", "late"],
)
@torch.no_grad()
def test_prefill_and_decode(model, method, positions):
    inputs = prompt([(3, 5), (6, 2)])
    engine = PruningEngine(BareQwen(model), make_pipeline([method]), positions)
    engine.install()
    output = model(**inputs)
    turn = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    record = engine.last_run()
    engine.hooks.remove()
    total = inputs["input_ids"].shape[1]
    for row in range(2):
        new = turn.sequences[row, total:]
        columns, logits = by_hand(model, inputs, record, row, positions == "compact", new[:-1])
        prefill = columns < total
        torch.testing.assert_close(output.logits[row, columns[prefill]], logits[prefill], atol=5e-4, rtol=5e-4)
        assert logits[-4:].argmax(-1).tolist() == new.tolist()
    assert record.visual_tokens_per_layer[0][0] == 24
    last = method.schedule(24, 6)[-1].tokens
    assert record.visual_tokens_per_layer[0][5] == last
    assert turn.past_key_values.layers[5].keys.shape[-2] == 3 + 5 + 2 + last + 3
