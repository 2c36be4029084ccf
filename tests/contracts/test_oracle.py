"""Contract 3: a pruned forward equals the unpatched language model on hand-compacted inputs, prefill and decode."""

import pytest
import torch

import vlmprune
from support.matrix import METHOD_PARAMETERS, over_matrix
from support.oracle import greedy_tokens, kept_columns, merged_embeddings, row_logits
from vlmprune.methods.registry import get_method

ROWS = {
    "single": [[3, "A", 4]],
    "left-padded": [[3, "A", 4], [2, "B", 1, "C", 6], [9]],
}


@over_matrix
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("keep", [0.3, 5])
def test_pruned_forward_equals_hand_compacted(method, family, rows, keep):
    model = family.build(torch.float32)
    inputs = family.inputs(rows)
    embeddings = merged_embeddings(model, inputs)
    steps = 6
    with torch.no_grad(), vlmprune.pruned(model, method, keep=keep, **METHOD_PARAMETERS[method]):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        generated = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    for row in range(len(rows)):
        columns = kept_columns(inputs, run, row)
        compacted = embeddings[row, columns]
        if get_method(method).merges:
            compacted = pooled_by_hand(embeddings[row], inputs["input_ids"][row], compacted, columns, run, row)
        torch.testing.assert_close(logits[row, columns], row_logits(model, compacted), atol=2e-5, rtol=1e-4)
        assert generated[row].tolist() == greedy_tokens(model, compacted, steps)
        assert all(count == len(columns) - run.text_tokens[row] for count in run.visual_tokens_per_layer[row])


def pooled_by_hand(embeddings, ids, compacted, columns, run, row):
    """Replace the kept tokens by the averages of the cells that they stand for."""
    compacted, start = compacted.clone(), 0
    placeholders = (ids == ids[columns].max()).nonzero().flatten()
    for image in (image for image in run.images if image.batch_index == row):
        mine = placeholders[start : start + image.total]
        grid = embeddings[mine].view(*image.grid, -1)
        cell_rows = (image.kept // image.grid[1]).unique().numel()
        cell_columns = image.kept.numel() // cell_rows
        for cell, token in enumerate(image.kept.tolist()):
            top, left = divmod(cell, cell_columns)
            spans = [
                slice(index * size // cells, -(-(index + 1) * size // cells))
                for index, size, cells in ((top, image.grid[0], cell_rows), (left, image.grid[1], cell_columns))
            ]
            place = (columns == mine[token]).nonzero().item()
            compacted[place] = grid[spans[0], spans[1]].flatten(0, 1).mean(0)
        start += image.total
    return compacted
