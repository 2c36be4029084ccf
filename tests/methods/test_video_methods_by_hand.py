"""What methods keep and merge of videos in a whole model, against plain loops on what the unpatched model computes."""

from dataclasses import replace

import pytest
import torch

import vlmprune
from support.families import llava_onevision, qwen2_5_vl, qwen3_vl
from support.layerwise import alive_columns, language_model_inputs, placeholders
from support.merging import entering
from support.plain_methods.fastvid import fastvid
from support.plain_methods.flashvid import flashvid
from support.plain_methods.holitom import holitom
from support.video_matrix import as_served
from vlmprune.methods import FastVID, FlashVID, HoliTom

# By name: the method, the plain loops, and what these call the parameters.
PLAIN = {
    "flashvid": (FlashVID(temporal_threshold=0.2, segment_threshold=0.2, min_segments=2), flashvid, {}),
    "flashvid-one-scene": (FlashVID(segment_threshold=-1.0, min_segments=1, temporal_threshold=0.0), flashvid, {}),
    "flashvid-defaults": (FlashVID(), flashvid, {}),
    "holitom": (HoliTom(tau=0.2), holitom, {}),
    "holitom-still": (HoliTom(tau=-0.3, beta=0.2), holitom, {}),
    "fastvid": (FastVID(scenes=2, tau=0.3, ignore=0.9), fastvid, {"scenes": "scenes_at_least"}),
    "fastvid-one-scene": (FastVID(scenes=1, tau=-1.0, ignore=0.99, step=2), fastvid, {"scenes": "scenes_at_least"}),
}
GIVEN = ("temporal_threshold", "segment_threshold", "min_segments", "tau", "beta", "scenes", "ignore", "step")
FAMILIES = (qwen2_5_vl.CASES[0], qwen3_vl.CASES[0], llava_onevision.CASES[0])
ROWS = {
    "one": [[3, "video", 4]],
    "three rows": [[3, "video", 4], [2, "video small", 2, "A", 5, "video large", 1], [6]],
}


def parameters_of(name):
    """The parameters of a method that are not its defaults, as the plain loops call them."""
    method, _, names = PLAIN[name]
    usual = type(method)()
    changed = {key: getattr(method, key) for key in GIVEN if hasattr(method, key)}
    return {names.get(key, key): value for key, value in changed.items() if value != getattr(usual, key)}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_kept_tokens_and_values_are_those_of_plain_loops(name, family, rows, monkeypatch):
    method, plain, _ = PLAIN[name]
    rows = as_served(name.partition("-")[0], family, rows)
    model, inputs = family.build(torch.float32), family.inputs(rows)
    embeddings = language_model_inputs(model, inputs)["inputs_embeds"]
    batches, select = [], type(method).select
    monkeypatch.setattr(type(method), "select", lambda self, batch: (batches.append(batch), select(self, batch))[1])
    with torch.no_grad(), vlmprune.pruned(model, replace(method, keep=0.4)), entering(model) as entered:
        model(**inputs)
        run = vlmprune.last_run(model)
    (batch,) = batches
    attention = batch.vision[method.vision_signals(batch.tower)[0]].mean(-1)
    wide = entered[0]["inputs_embeds"]
    for number, (video, scores) in enumerate(zip(run.videos, attention.split(list(batch.counts)), strict=True)):
        row = video.batch_index
        before = [image.total for image in run.images if image.batch_index == row]
        place = [image for image in run.images if image.batch_index == row].index(video)
        columns = placeholders(model, inputs["input_ids"])[row].nonzero().flatten()
        columns = columns[sum(before[:place]) :][: video.total]
        frames, patches = video.layout.frames, video.total - int(video.layout.newline.sum())
        tokens = embeddings[row, columns][:patches].view(frames, patches // frames, -1)
        expected = plain(
            tokens,
            scores.view(frames, -1),
            batch.budgets[number],
            batch.tower.patches_per_token > 1,
            **parameters_of(name),
        )
        kept = video.kept[~video.layout.newline[video.kept]]
        assert kept.tolist() == list(expected)
        alive = alive_columns(model, inputs, run, row, 0).tolist()
        seats = [wide.shape[1] - len(alive) + alive.index(int(columns[token])) for token in kept]
        torch.testing.assert_close(wide[row, seats], torch.stack(list(expected.values())), atol=2e-5, rtol=1e-4)
