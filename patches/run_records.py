"""The records of prefills that `last_run` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmprune.record import RunRecord

from .calls import LanguageModelCall
from .prefill.entry_cut import EntryCut
from .prefill.visuals import PrefillVisuals

if TYPE_CHECKING:
    from .layers.run import LayerRun


def entry_record(
    method: str,
    signal: str | None,
    decoder_layers: int,
    call: LanguageModelCall,
    visuals: PrefillVisuals,
    cut: EntryCut,
    tower_groups: Sequence[Tensor] = (),
) -> RunRecord:
    """Return the record of a prefill with images, as it is at the language model's entry.

    Args:
        method: names of the applied methods.
        signal: what the method at the entry scored by, in words.
        decoder_layers: layers of the language model.
        call: the call in the caller's columns.
        visuals: the images.
        cut: what enters.
        tower_groups: of each shown image where its patches went in the vision tower, where any were reduced there.
    """
    spans, modalities = visuals.spans, visuals.modalities
    totals = call.visual.sum(1).tolist()
    removed = cut.removed or (0,) * call.batch
    return RunRecord(
        method=method,
        signal=signal,
        text_tokens=call.text[:, : call.columns - call.drafts].sum(1).tolist(),
        visual_tokens_per_layer=[
            [total - dropped] * decoder_layers for total, dropped in zip(totals, removed, strict=True)
        ],
        image_rows=spans.rows,
        image_totals=spans.counts,
        image_layouts=[visuals.layouts[image] for image in spans.unique],
        image_modalities=[modalities[image] for image in spans.unique],
        kept_per_image=cut.index,
        groups_per_image=cut.groups,
        tower_groups_per_image=[tower_groups[image] for image in spans.unique] if tower_groups else (),
        ranked_per_image=cut.ranked(spans),
        text=call.text.unbind(),
        image_columns=spans.flat.split(list(spans.counts)),
    )


def text_record(method: str, decoder_layers: int, call: LanguageModelCall) -> RunRecord:
    """Return the record of a prefill without images."""
    mask = call.mask
    text = torch.ones(call.batch, call.columns, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        text = mask[:, -call.columns :].bool().cpu()
    return RunRecord(
        method=method,
        signal=None,
        text_tokens=text.sum(1).tolist(),
        visual_tokens_per_layer=[[0] * decoder_layers for _ in range(call.batch)],
        image_rows=(),
        image_totals=(),
        image_layouts=(),
        image_modalities=(),
        kept_per_image=(),
        text=text.unbind(),
    )


def finished_record(run: LayerRun, signal: str) -> RunRecord:
    """Return the record of a prefill that may have been cut between layers, with what every layer saw.

    Args:
        run: the call, after its last layer.
        signal: what the layers were scored by, in words.
    """
    record = run.record
    if record is None:
        raise RuntimeError("A prefill without a record of what entered it.")
    if run.scored:
        record = replace(record, signal=", ".join(name for name in (record.signal, signal) if name))
    if not run.kept_by_cut:
        return record
    images = run.cut_images
    per_layer = [list(row) for row in record.visual_tokens_per_layer]
    for first, compaction in run.cuts:
        for row, (total, removed) in enumerate(zip(images.visual_lengths, compaction.removed, strict=True)):
            per_layer[row][first:] = [total - removed] * (len(per_layer[row]) - first)
    return replace(
        record,
        visual_tokens_per_layer=per_layer,
        kept_per_image=images.index,
        kept_by_stage=((0, record.kept_per_image), *run.kept_by_cut),
        groups_by_stage=tuple(run.groups_by_cut),
        ranked_per_image=record.ranked_per_image or run.ranked(),
    )
