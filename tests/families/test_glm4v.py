"""GLM-4V: what is read of the tower, against the host's own eager attention; videos behind the placeholders of images."""

import pytest
import torch

import vlmprune
from support.families.by_hand import kept_by_row, language_model_inputs
from support.families.glm4v import CASES, GLM4V
from support.families.rotary import rotary_positions
from support.oracle import suppressed
from support.tower_probe import host_attention, seen_by_a_method
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.registry import find_family

IMAGES = [[3, "A", 4], [2, "small", 1, "large", 6], [9]]
VIDEOS = [[3, "video", 4], [2, "video small", 1, "video large", 6], [9]]
over_rows = pytest.mark.parametrize("rows", [IMAGES, VIDEOS], ids=["images", "videos"])


def by_fours(patches):
    """The means of four patches each, which lie together in the tower's order."""
    return torch.stack([patches[place : place + 4].mean(0) for place in range(0, len(patches), 4)])


@over_rows
def test_signals_are_the_hosts_averaged_over_the_patches_of_a_token(rows, monkeypatch):
    layers = range(3)
    kinds = ("received_attention", "keys", "mean_query_attention")
    batch = seen_by_a_method(
        monkeypatch, GLM4V, rows, [VisionSignal(kind, layer) for kind in kinds for layer in layers]
    )
    host = host_attention(monkeypatch, GLM4V, rows)
    for layer in layers:
        received = torch.cat([by_fours(weights[0].mean(1).T) for weights, _, _ in host[layer]])
        keys = torch.cat([by_fours(key[0].transpose(0, 1).flatten(1)) for _, _, key in host[layer]])
        asked = []
        for _, query, key in host[layer]:
            means = by_fours(key[0].transpose(0, 1).flatten(1)).unflatten(-1, (query.shape[1], -1))
            logits = torch.einsum("hd,khd->kh", query[0].mean(1), means) * query.shape[-1] ** -0.5
            asked.append(logits.softmax(0))
        for kind, expected in zip(kinds, (received, keys, torch.cat(asked)), strict=True):
            torch.testing.assert_close(batch.vision[VisionSignal(kind, layer)], expected, atol=1e-5, rtol=1e-4)


@over_rows
def test_features_are_those_that_the_convolution_merges(rows, monkeypatch):
    model = GLM4V.build(torch.float32)
    signal = VisionSignal("features", 2)
    batch = seen_by_a_method(monkeypatch, GLM4V, rows, [signal])
    seen = []
    handle = model.model.visual.post_layernorm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**GLM4V.inputs(rows))
    handle.remove()
    rows_of_tokens = torch.stack([seen[0][place : place + 4].flatten() for place in range(0, len(seen[0]), 4)])
    assert torch.equal(batch.vision[signal], rows_of_tokens)
    torch.testing.assert_close(batch.project(rows_of_tokens), batch.features, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", ["fastervlm", "divprune", "visionzip", "holitom", "fastv"])
def test_videos_by_hand(case, method):
    """The unpatched decoder on the kept tokens with their own positions, behind which decoding goes on from the prompt's."""
    model, inputs = case.build(torch.float32), case.inputs(VIDEOS)
    given = language_model_inputs(model, inputs)
    parameters = {"layer": 1} if method == "fastv" else {"inner_layer": 3} if method == "holitom" else {}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.5, **parameters):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    totals = [(image.batch_index, image.total) for image in run.images]
    assert totals == [(0, 48), (1, 32), (1, 96)]
    for row, items in enumerate(VIDEOS):
        with torch.no_grad(), vlmprune.pruned(model, method, keep=0.5, **parameters):
            alone = case.inputs([items])
            expected = model(**alone).logits[0]
            assert model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:].tolist() == new[row].tolist()
        valid = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, valid], expected, atol=1e-4, rtol=1e-3)
    if method in ("fastervlm", "divprune"):
        for row in range(len(VIDEOS)):
            columns = kept_by_row(model, inputs, run, row)
            ids = given["position_ids"][-3:, row]
            last = ids[:, inputs["attention_mask"][row].bool()].max()
            ids = torch.cat([ids[:, columns], last + 1 + torch.arange(3).expand(3, -1)], 1)
            table = torch.cat([given["inputs_embeds"][row, columns], model.get_input_embeddings()(new[row, :3])])
            with torch.no_grad():
                output = model.model.language_model(
                    inputs_embeds=table[None], position_ids=ids[:, None], use_cache=False
                )
                by_hand = model.lm_head(output.last_hidden_state)[0]
            torch.testing.assert_close(logits[row, columns], by_hand[: len(columns)], atol=1e-4, rtol=1e-3)
            assert suppressed(by_hand[-4:]).argmax(-1).tolist() == new[row].tolist()


def test_positions_of_decode_steps_follow_the_whole_prompt():
    model, inputs = GLM4V.build(torch.float32), GLM4V.inputs(IMAGES)
    with torch.no_grad(), rotary_positions(model) as plain:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.3), rotary_positions(model) as pruned:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len(pruned) == len(plain) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(pruned[1:], plain[1:], strict=True))


def test_images_beside_videos_are_refused_as_by_the_host():
    model = GLM4V.build(torch.float32)
    inputs = GLM4V.inputs([[3, "A", 2, "video", 4]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="features and image tokens do not match"):
            model(**inputs)
        with vlmprune.pruned(model, "divprune", keep=0.5), pytest.raises(ValueError, match="do not match"):
            model(**inputs)


def test_needs_that_are_not_met():
    model = GLM4V.build(torch.float32)
    assert find_family(model).name == "GLM-4V"
    with pytest.raises(UnsupportedMethodError, match="CLS token"):
        vlmprune.apply(model, "recoverable_compression", keep=0.5, relevance="instruction")
