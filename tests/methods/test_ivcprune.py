"""IVC-Prune: the official counts, and what is kept against plain loops."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families import qwen2_5_vl
from support.layerwise import language_model_inputs, placeholders
from support.plain_methods.ivcprune import ivcprune
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError
from vlmprune.methods import IVCPrune
from vlmprune.methods.layer.ivcprune_image import IVCCounts
from vlmprune.methods.shared.rotary_coordinates import coordinate_ranks, rotary_tables, table_means

FAMILIES = [deeper(LLAVA_CLIP_GQA), deeper(qwen2_5_vl.CASES[0])]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 2, "small", 6], [9, "large"]]}
CUT = 3


def test_official_counts():
    paper = IVCPrune(share=0.5)
    for total, kept, positions, seeds in ((576, 288, 58, 6), (2880, 1440, 288, 29)):
        assert paper.schedule(total, 32) == ((16, kept),)
        assert paper.counts(total) == IVCCounts(seeds, positions, kept, kept)
    llava = IVCPrune(share=0.2, variant="llava-1.5")
    for total, best, positions, seeds in ((576, 115, 29, 6), (2880, 576, 144, 29)):
        assert llava.schedule(total, 32) == ((16, None),)
        assert llava.counts(total) == IVCCounts(seeds, positions, best, None)
    assert IVCPrune(layer=16, share=0.5).cut_layers(28) == (16,)
    assert [paper.cut_layers(layers) for layers in (2, 24, 28, 36)] == [(1,), (12,), (14,), (18,)]


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25, 0.1, 144, 300])
def test_keep_is_the_average_over_layers(keep):
    method = IVCPrune(keep=keep)
    ((cut, kept),) = method.schedule(576, 32)
    average = (cut * 576 + (32 - cut) * kept) / 32
    assert average == pytest.approx(keep if isinstance(keep, int) else keep * 576, abs=1)
    assert cut in method.cut_layers(32)
    assert IVCPrune(keep=0.75).schedule(576, 32) == ((16, 288),)


def test_what_cannot_be_is_refused():
    with pytest.raises(ParameterError, match="both set the budget"):
        IVCPrune(keep=0.5, share=0.5)
    with pytest.raises(ParameterError, match=r"share=1\.5"):
        IVCPrune(share=1.5)
    with pytest.raises(BudgetError, match=r"keep=0\.25.*nearest"):
        IVCPrune(keep=0.25, layer=16).cut_layers(32)
    with pytest.raises(ParameterError, match="holds 40"):
        IVCPrune(share=0.5, layer=40).cut_layers(32)


def test_tokens_mirrored_in_height_and_width_tie_to_the_bit():
    height, width = (axis.flatten() for axis in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    positions = torch.stack([torch.full((81,), 4), 4 + height, 4 + width])
    mirrored = positions[[0, 2, 1]]
    frequencies = 1e6 ** -(torch.arange(0, 128, 2) / 128)
    for table, other in zip(rotary_tables(positions, frequencies), rotary_tables(mirrored, frequencies), strict=True):
        assert torch.equal(table_means(table), table_means(other))


def test_coordinates_are_taken_in_turns():
    ranks = coordinate_ranks(torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([0.0, 0.8, 0.9, 0.1]))
    assert ranks.argsort(descending=True, stable=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_kept_tokens_are_those_of_plain_loops(family, rows):
    model, batched = family.build(torch.float32), family.inputs(rows)
    method = IVCPrune(layer=CUT, share=0.4)
    with torch.no_grad(), vlmprune.pruned(model, method):
        output = model(**batched)
        records = vlmprune.last_run(model).images
    lengths = {layer.keys.shape[2] for layer in output.past_key_values.layers}
    assert len(lengths) == 1, "all layers hold the same tokens"
    frequencies = model.model.language_model.rotary_emb.inv_freq.tolist()
    for row, own in enumerate(rows):
        inputs, seen = family.inputs([own]), []
        attention = model.model.language_model.layers[CUT - 1].self_attn
        handle = attention.v_proj.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
        try:
            given = language_model_inputs(model, inputs)
        finally:
            handle.remove()
        positions = given.get("position_ids")
        width = inputs["input_ids"].shape[1]
        positions = (
            torch.arange(width)[None] if positions is None else positions[-3:, 0] if positions.ndim == 3 else positions
        )
        visual = placeholders(model, inputs["input_ids"])[0]
        columns = visual.nonzero().flatten().tolist()
        for record in (record for record in records if record.batch_index == row):
            image, columns = columns[: record.total], columns[record.total :]
            after = [column for column in range(image[-1] + 1, width) if not visual[column]]
            text = after[2:] or after or [column for column in range(image[0]) if not visual[column]]
            counts = [max(1, round(0.01 * record.total)), round(0.08 * record.total), max(1, round(0.4 * record.total))]
            values = seen[0].unflatten(-1, (-1, attention.head_dim))
            assert record.kept.tolist() == ivcprune(values, image, text, positions, frequencies, counts)


def test_the_union_of_the_official_llava_rules_decides_the_count():
    family = FAMILIES[0]
    model, inputs = family.build(torch.float32), family.inputs(ROWS["three rows"])
    with torch.no_grad(), vlmprune.pruned(model, "ivcprune", layer=CUT, share=0.2, variant="llava-1.5"):
        model(**inputs)
        records = vlmprune.last_run(model).images
    for record in records:
        total = record.total
        assert round(0.2 * total) <= len(record.kept) <= round(0.2 * total) + 2 * round(0.05 * total) + 1
