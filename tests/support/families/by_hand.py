"""A pruned prefill and its decode by hand: the unpatched language model on the tokens that are kept, row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder
from support.layerwise import close_gaps, language_model_inputs, placeholders
from support.oracle import suppressed

__all__ = ["check_pruned", "kept_by_row", "language_model_inputs", "placeholders", "row_by_hand"]


def kept_by_row(model: Any, inputs: dict[str, Tensor], record: Any, row: int) -> Tensor:
    """Return the columns of a row that stay: valid text, and of each image or video what the record says, ascending."""
    visual = placeholders(model, inputs["input_ids"][row])
    columns, mine = [(inputs["attention_mask"][row].bool() & ~visual).nonzero().flatten()], visual.nonzero().flatten()
    for image in record.images:
        if image.batch_index == row:
            columns.append(mine[: image.total][image.kept])
            mine = mine[image.total :]
    assert mine.numel() == 0
    return torch.cat(columns).sort().values


@torch.no_grad()
def row_by_hand(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    row: int,
    given: dict[str, Any],
    later: Tensor | None = None,
    changed: dict[str, Any] | None = None,
    compact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the unpatched language model on what is kept of a row.

    Args:
        model: the unpatched model.
        inputs: the model inputs of the batch.
        record: what was kept.
        row: which row.
        given: `language_model_inputs(model, inputs)`, with original position ids.
        later: ids of text that follows the prompt.
        changed: what replaces `inputs_embeds [kept, dim]` or `deepstack_visual_embeds` (per layer `[kept visual, dim]`).
        compact: whether 3-D positions close the gaps that no kept token uses; 1-D positions always do here.

    Returns:
        The kept columns, and the logits `[kept + later, vocabulary]`.
    """
    later = torch.zeros(0, dtype=torch.int64) if later is None else later
    changed = changed or {}
    language_model, count = decoder(model), len(later)
    visual, columns = placeholders(model, inputs["input_ids"]), kept_by_row(model, inputs, record, row)
    valid = inputs["attention_mask"][row].bool()

    ids = given.get("position_ids")
    if ids is None or ids.ndim == 2:
        ids = torch.arange(len(columns) + count)[None]
    else:
        ids = ids[-3:, row]
        after = ids[:, valid].max() + 1 + torch.arange(count).expand(3, -1)
        full, ids = torch.cat([ids[:, valid], after], 1), torch.cat([ids[:, columns], after], 1)
        ids = (close_gaps(ids, full, ids) if compact else ids)[:, None]
    embeddings = changed.get("inputs_embeds", given["inputs_embeds"][row, columns])
    embeddings = torch.cat([embeddings, model.get_input_embeddings()(later)])
    arguments: dict[str, Any] = {}
    if given.get("deepstack_visual_embeds") is not None:
        rank = visual.flatten().cumsum(0).view_as(visual)[row] - 1
        arguments = {
            "visual_pos_masks": torch.cat([visual[row, columns], torch.zeros(count, dtype=torch.bool)])[None],
            "deepstack_visual_embeds": changed.get("deepstack_visual_embeds")
            or [deep[rank[columns[visual[row, columns]]]] for deep in given["deepstack_visual_embeds"]],
        }
    output = language_model(
        inputs_embeds=embeddings[None],
        position_ids=ids,
        attention_mask=torch.ones(1, len(embeddings), dtype=torch.int64),
        use_cache=False,
        **arguments,
    )
    return columns, model.lm_head(output.last_hidden_state)[0]


def check_pruned(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    logits: Tensor,
    generated: Tensor,
    given: dict[str, Any],
    compact: bool = False,
) -> None:
    """Assert that pruned `logits [batch, columns, vocabulary]` and greedy tokens `[batch, new]` are those made by hand."""
    for row in range(len(logits)):
        columns, expected = row_by_hand(model, inputs, record, row, given, later=generated[row, :-1], compact=compact)
        torch.testing.assert_close(logits[row, columns], expected[: len(columns)], atol=2e-5, rtol=1e-4)
        assert suppressed(expected[len(columns) - 1 :]).argmax(-1).tolist() == generated[row].tolist()
