"""`output_attentions=True`: maps of pruned lengths, and the way back to the prompt."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.qwen3_vl import QWEN3_VL
from support.layerwise import alive_columns
from support.tiny_models import LLAVA_CLIP_GQA

ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]
METHODS = [
    ("divprune", {}),
    ("pool", {}),
    ("fastv", {"layer": 1}),
    ("pyramiddrop", {}),
    ("todre", {"tau": 1.0, "layer": 3}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[method for method, _ in METHODS])
@pytest.mark.parametrize("case", [deeper(LLAVA_CLIP_GQA), deeper(QWEN3_VL)], ids=str)
def test_attention_maps_lead_back_to_the_prompt(case, method, parameters):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), vlmprune.pruned(model, method, keep=0.6, **parameters):
            attentions = model(**inputs, output_attentions=True).attentions
            run = vlmprune.last_run(model)
            alone = []
            for row in range(len(ROWS)):
                alone.append(model(**case.inputs([ROWS[row]]), output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(previous)
    assert len(attentions) == len(run.visual_tokens_per_layer[0])
    shorter = 0
    for layer, maps in enumerate(attentions):
        for row in range(len(ROWS)):
            columns = run.kept_columns(row, layer)
            assert columns.tolist() == alive_columns(model, inputs, run, row, layer).tolist()
            width = len(columns)
            shorter += maps.shape[-1] < inputs["input_ids"].shape[1]
            if maps.shape[-1] == inputs["input_ids"].shape[1]:
                assert torch.equal(columns, inputs["attention_mask"][row].nonzero().flatten())
            mine = maps[row, :, -width:, -width:]
            torch.testing.assert_close(mine, alone[row][layer][0], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:2]))
    assert shorter


def test_columns_of_text_and_of_rows_that_do_not_exist():
    case = deeper(LLAVA_CLIP_GQA)
    model = case.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        model(**case.inputs([[3], [5]]))
        run = vlmprune.last_run(model)
    assert run.kept_columns(0).tolist() == [2, 3, 4]
    assert run.kept_columns(1, 5).tolist() == [0, 1, 2, 3, 4]
    for row, layer in ((2, 0), (-1, 0), (0, 6)):
        with pytest.raises(IndexError, match="2 rows and 6 layers"):
            run.kept_columns(row, layer)
