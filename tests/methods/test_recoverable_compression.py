"""Recoverable Compression against plain loops with scikit-learn's outliers, and what `keep` makes of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from support import method_batches as build
from support.plain_tower import plain_image
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods import RecoverableCompression
from vlmprune.methods.shared.outliers import local_outlier_factor

neighbors = pytest.importorskip("sklearn.neighbors")
from support.plain_methods.recoverable_compression import recoverable_compression  # noqa: E402


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 10**9), min_size=3, max_size=90, unique=True),
    neighbours=st.integers(1, 20),
    scale=st.floats(1e-9, 1e3),
)
def test_the_outlier_factor_is_that_of_scikit_learn(values, neighbours, scale):
    numbers = torch.tensor(values).double() * scale / 1e6
    number = min(neighbours, len(values) - 1)
    expected = neighbors.LocalOutlierFactor(number, algorithm="brute").fit(numbers[:, None].numpy())
    # Equally near neighbours may be taken either way.
    gaps = (numbers[:, None] - numbers).abs().sort(1).values
    if number + 1 < len(values) and bool((gaps[:, number] == gaps[:, number + 1]).any()):
        return
    torch.testing.assert_close(
        local_outlier_factor(numbers, neighbours),
        -torch.from_numpy(expected.negative_outlier_factor_),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("mode", ["code", "fixed"])
@pytest.mark.parametrize("rows", [[[3, "A", 4]], [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]], ids=["single", "rows"])
def test_what_enters_the_language_model_is_that_of_plain_loops(mode, rows):
    from methods.test_end_to_end import entering_embeddings
    from methods.test_question_methods import words_of

    family = LLAVA_CLIP_GQA
    model, inputs = family.build(torch.float32), family.inputs(rows)
    images = [item for row in rows for item in row if isinstance(item, str)]
    with torch.no_grad():
        with vlmprune.pruned(model, "recoverable_compression", mode=mode, relevance="instruction"):
            entered = entering_embeddings(model, inputs)
            records = vlmprune.last_run(model).images
        everything = zip(records, images, entered(records, rows), words_of(inputs, rows), strict=True)
        for record, name, values, words in everything:
            plain = plain_image(model, family.image(name)["pixel_values"])
            kept, merged = recoverable_compression(plain, model.get_input_embeddings()(words), mode)
            assert record.kept.tolist() == kept
            torch.testing.assert_close(values, merged, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["code", "fixed"])
def test_contrastive_similarity_is_that_of_the_clip_model(mode):
    from methods.test_end_to_end import entering_embeddings
    from methods.test_question_methods import tiny_clip, words_of

    family, rows = LLAVA_CLIP_GQA, [[3, "A", 4], [2, "B", 1, "C", 6]]
    model, inputs = family.build(torch.float32), family.inputs(rows)
    tower, tokenizer = tiny_clip()
    parameters = {"mode": mode, "text_tower": (tower, tokenizer), "tokenizer": tokenizer}
    with torch.no_grad():
        with vlmprune.pruned(model, "recoverable_compression", **parameters):
            entered = entering_embeddings(model, inputs)
            records = vlmprune.last_run(model).images
        for record, name, values, words in zip(
            records, "ABC", entered(records, rows), words_of(inputs, rows), strict=True
        ):
            plain = plain_image(model, family.image(name)["pixel_values"])
            ids = [int(word) for word in words]
            last = model.model.vision_tower(family.image(name)["pixel_values"], output_hidden_states=True)
            states = last.hidden_states[-1][0, 1:]
            if mode == "code":
                filled = torch.tensor([(ids + [0] * 5)[:5]])
                text = tower.text_projection(tower.text_model(input_ids=filled).last_hidden_state[:, -1])
            else:
                states = tower.vision_model.post_layernorm(states)
                segments = [ids[start : start + 5] for start in range(0, len(ids), 5)]
                padded = torch.tensor([segment + [0] * (5 - len(segment)) for segment in segments])
                text = tower.get_text_features(input_ids=padded).pooler_output.mean(0)[None]
            similarity = torch.cosine_similarity(tower.visual_projection(states), text, dim=-1) * 768**-0.5
            kept, merged = recoverable_compression(plain, words, mode, similarity)
            assert record.kept.tolist() == kept
            torch.testing.assert_close(values, merged, atol=1e-5, rtol=1e-4)


def spread_batch(method, keep_order="position"):
    """An image with clear outliers of attention and of similarity."""
    layouts = [build.raster_layout(8, 8), build.anyres_layout((1, 2), 6, 100, 200)]
    batch = build.random_batch(method, layouts, 2)
    attention = batch.vision[method.vision_signals(batch.tower)[0]]
    attention /= 100
    attention[3:6] += 5.0
    attention[40] += 1.0
    return batch


def test_orders_hold_the_same_tokens_and_groups_follow():
    selections = {}
    for order in ("position", "official"):
        method = RecoverableCompression(relevance="instruction", order=order)
        selections[order] = method.select(spread_batch(method))
    position, official = selections.values()
    assert torch.equal(position.kept, official.kept)
    assert not torch.equal(position.features, official.features)
    first = position.counts[0]
    for selection in selections.values():
        groups = selection.groups[:64]
        assert groups.max() == first - 1
        # A kept token that is alone has its own value in its place.
        for token in (3, 4, 5):
            batch = spread_batch(RecoverableCompression(relevance="instruction"))
            assert torch.equal(selection.features[groups[token]], batch.features[token])


@pytest.mark.parametrize("keep", [1, 2, 5, 30, 63])
def test_a_given_keep_is_met(keep):
    method = RecoverableCompression(relevance="instruction", keep=keep)
    batch = spread_batch(method)
    build.check_selection(method.select(batch), batch)


def test_a_tower_without_cls_token_is_refused():
    from support.tiny_models import LLAVA_SIGLIP_TIED

    with pytest.raises(UnsupportedMethodError, match="a CLS token"):
        vlmprune.apply(LLAVA_SIGLIP_TIED.build(torch.float32), "recoverable_compression", relevance="instruction")
