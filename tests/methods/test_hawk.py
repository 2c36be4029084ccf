"""HAWK: what asks, what is kept against plain loops, where its weights come from."""

import json

import pytest
import torch

import vlmprune
from support.families import qwen2_5_vl, qwen3_vl
from support.plain_methods.hawk import hawk
from support.tiny_models import IMAGE_TOKEN, LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError
from vlmprune.methods import HAWK
from vlmprune.methods.first_layer import FirstLayer, question_range
from vlmprune.methods.input.hawk import hawk_count, hawk_scores
from vlmprune.methods.input.hawk_weights import QWEN2_5_VL_7B, shipped_weights

ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]}


def layer_inputs(model, inputs):
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("family", [LLAVA_CLIP_GQA, qwen2_5_vl.CASES[0], qwen3_vl.CASES[0]], ids=str)
def test_kept_tokens_are_those_of_plain_loops(family, rows, weighted):
    model, inputs = family.build(torch.float32), family.inputs(rows)
    heads = model.config.get_text_config().num_attention_heads
    weights = [float(head * head) for head in range(1, heads + 1)] if weighted else None
    with torch.no_grad():
        embeddings = layer_inputs(model, inputs)
        with vlmprune.pruned(model, "hawk", keep=7, head_weights=weights):
            model(**inputs)
            records = vlmprune.last_run(model).images
        token = getattr(model.config, "image_token_id", IMAGE_TOKEN)
        places = {row: (inputs["input_ids"][row] == token).nonzero().flatten() for row in range(len(rows))}
        for record in records:
            row = record.batch_index
            mine, places[row] = places[row][: record.total], places[row][record.total :]
            alive = inputs["attention_mask"][row].bool().nonzero().flatten()
            last = int((inputs["input_ids"][row] == token).nonzero()[-1])
            behind = alive[alive > last]
            end = getattr(model.config, "vision_end_token_id", None)
            if len(behind) and int(inputs["input_ids"][row, behind[0]]) == end:
                behind = behind[1:] if len(behind) > 1 else behind
            asking = behind if len(behind) else torch.tensor([last])
            assert record.kept.tolist() == hawk(model, embeddings[row, mine], embeddings[row, asking], 7, weights)


def test_the_question_ends_with_the_turn():
    ids = [1, 9, 9, 4, 5, 6, 2, 7]
    assert question_range(ids, 2) == (3, 8)
    assert question_range(ids, 2, 4, frozenset({2})) == (4, 6)
    assert question_range(ids, 2, 5, frozenset({6})) == (5, 8)
    assert question_range(ids[:3], 2) == (2, 3)
    assert question_range([1, 9, 4], 1, 4) == (2, 3)


def test_a_model_with_ends_of_turns_is_asked_up_to_the_last():
    family = LLAVA_CLIP_GQA
    model = family.build(torch.float32)
    end, kept = 8, {}
    before = model.generation_config.eos_token_id
    with torch.no_grad(), vlmprune.pruned(model, "hawk", keep=6):
        for ends in (None, [end]):
            model.generation_config.eos_token_id = ends
            for last in range(20, 26):
                inputs = family.inputs([[3, "A", 5]])
                inputs["input_ids"][0, -2:] = torch.tensor([end, last])
                model(**inputs)
                kept.setdefault(bool(ends), set()).add(tuple(vlmprune.last_run(model).images[0].kept.tolist()))
        model.generation_config.eos_token_id = before
    assert len(kept[True]) == 1
    assert len(kept[False]) > 1


def test_official_counts():
    official = HAWK(keep=0.198, rounding="ceil")
    assert [official.budget(total) for total in (576, 2880)] == [115, 571]
    assert [HAWK(keep=0.198).budget(total) for total in (576, 2880)] == [114, 570]
    assert hawk_count(0.07, 300, "ceil") == 22
    assert HAWK(keep=0.001, min_visual_tokens=4).budget(30) == 4
    assert HAWK(keep=0.001, min_visual_tokens=4).budget(3) == 3


def test_the_published_weights_are_taken_for_their_model_alone():
    def layer(family, width, heads):
        return FirstLayer(family, width, heads, 1.0, lambda rows: rows, lambda rows: rows)

    assert shipped_weights(layer("Qwen2.5-VL", 3584, 28)) == QWEN2_5_VL_7B
    assert sum(QWEN2_5_VL_7B) == pytest.approx(1.2616)
    assert QWEN2_5_VL_7B[1] / sum(QWEN2_5_VL_7B) == pytest.approx(0.24, abs=0.005)
    for other in (("Qwen2-VL", 3584, 28), ("Qwen2.5-VL", 2048, 16)):
        assert set(shipped_weights(layer(*other))) == {1.0}


def test_scores_that_are_no_numbers_count_as_nothing():
    queries, keys = torch.ones(1, 2, 4), torch.ones(3, 2, 4)
    keys[1] = torch.inf
    keys[2, 1] = torch.nan
    scores = hawk_scores(queries, keys, torch.ones(2), 0.5)
    assert scores.isfinite().all()
    assert scores.argsort(descending=True).tolist() == [0, 2, 1]
    for normalization in ("softmax", "minmax"):
        assert hawk_scores(queries, keys, torch.ones(2), 0.5, normalization).isfinite().all()


def test_weights_of_a_file(tmp_path):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"head_weights": [1, 3, 0, 0]}))
    assert HAWK(head_weights=file).head_weights == (0.25, 0.75, 0.0, 0.0)
    file.write_text("{}")
    with pytest.raises(ParameterError, match=r"weights.json.*vlmprune calibrate"):
        HAWK(head_weights=str(file))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), "none above 0"),
        ((1.0, float("nan")), "nan for head 1"),
        ((1.0, -2.0), "-2.0 for head 1"),
        (3, "head_weights=3"),
        ("nowhere.json", "FileNotFoundError"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ParameterError, match=message):
        HAWK(head_weights=weights)


def test_weights_of_another_model_are_refused():
    family = LLAVA_CLIP_GQA
    model = family.build(torch.float32)
    with (
        vlmprune.pruned(model, "hawk", keep=5, head_weights=(1.0, 2.0, 3.0)),
        pytest.raises(ParameterError, match="has 3 weights, the first layer of this LLaVA model has"),
    ):
        model(**family.inputs([[3, "A", 4]]))
