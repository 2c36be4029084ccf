"""Methods that score by the words of the prompt: which words they get, and what they keep, against plain loops."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import vlmprune
from support.plain_methods.cdpruner import cdpruner
from support.plain_methods.mmtok import mmtok
from support.plain_tower import plain_image
from support.tiny_models import CLIP, IMAGE_TOKEN, LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED, PAD, spread_weights
from vlmprune.errors import ParameterError, UnsupportedCallError
from vlmprune.methods.shared.words import keywords, question_text

FAMILIES = [LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]}
PLAIN = {"mmtok": (mmtok, {}), "cdpruner": (cdpruner, {"relevance": "instruction"})}


def words_of(inputs, rows):
    """Ids of the text behind a row's first image, or before it where nothing follows, for every image."""
    for row, items in enumerate(rows):
        ids = inputs["input_ids"][row].tolist()
        first = ids.index(IMAGE_TOKEN)
        after = [token for token in ids[first:] if token not in (IMAGE_TOKEN, PAD, 1)]
        before = [token for token in ids[:first] if token not in (PAD, 1)]
        yield from [torch.tensor(after or before)] * sum(isinstance(item, str) for item in items)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_kept_tokens_are_those_of_plain_loops(name, family, rows):
    choose, parameters = PLAIN[name]
    model = family.build(torch.float32)
    inputs = family.inputs(rows)
    images = [item for row in rows for item in row if isinstance(item, str)]
    words = list(words_of(inputs, rows))
    for keep in (1, 9):
        with torch.no_grad(), vlmprune.pruned(model, name, keep=keep, **parameters):
            model(**inputs)
            kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
            for number, image in enumerate(images):
                plain = plain_image(model, family.image(image)["pixel_values"])
                assert kept[number] == choose(plain, keep, model.get_input_embeddings()(words[number]))


def test_another_question_keeps_other_tokens():
    family, kept = LLAVA_CLIP_GQA, set()
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "mmtok", keep=6):
        for question in range(3, 9):
            model(**family.inputs([[3, "A", question]]))
            kept.add(tuple(vlmprune.last_run(model).images[0].kept.tolist()))
    assert len(kept) > 1


def test_a_prompt_without_words_is_refused():
    family = LLAVA_CLIP_GQA
    model, inputs = family.build(torch.float32), family.inputs([["A"]])
    with vlmprune.pruned(model, "mmtok", keep=6), pytest.raises(UnsupportedCallError, match="has no text"):
        model(**inputs)


def test_common_words_and_answer_formats_are_no_keywords():
    assert keywords("What is the dog's colour?") == "dog s colour"
    assert keywords("Who is it?") == "Who is it?"
    asked = "What is this?\nAnswer the question using a single word or phrase. ASSISTANT:"
    assert question_text(asked) == "What is this?"


def tokenizer_of(vocabulary):
    words = {f"w{number}": number for number in range(vocabulary)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0")


def tiny_clip():
    """A real CLIP model whose vision tower has the width of the tiny LLaVA's, and its tokenizer."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 130,
    }
    text |= {"max_position_embeddings": 5, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=CLIP.to_dict(), projection_dim=12)
    return spread_weights(CLIPModel(config)).eval(), tokenizer_of(130)


@pytest.fixture
def clip():
    return tiny_clip()


def test_contrastive_relevance_is_that_of_the_clip_model(clip):
    family, rows = LLAVA_CLIP_GQA, ROWS["three rows"]
    model, inputs = family.build(torch.float32), family.inputs(rows)
    tower, tokenizer = clip
    images = [item for row in rows for item in row if isinstance(item, str)]
    parameters = {"text_tower": clip, "tokenizer": tokenizer}
    with torch.no_grad(), vlmprune.pruned(model, "cdpruner", keep=7, **parameters):
        model(**inputs)
        records = vlmprune.last_run(model).images
    with torch.no_grad():
        for record, name, words in zip(records, images, words_of(inputs, rows), strict=True):
            plain = plain_image(model, family.image(name)["pixel_values"])
            ids = tokenizer(" ".join(f"w{word}" for word in words.tolist()))["input_ids"]
            segments = [ids[start : start + 5] for start in range(0, len(ids), 5)]
            relevance = torch.zeros(len(plain.features))
            for segment in segments:
                padded = torch.tensor([segment + [0] * (5 - len(segment))])
                text = tower.get_text_features(input_ids=padded).pooler_output[0]
                patches = tower.visual_projection(tower.vision_model.post_layernorm(plain.states[1:]))
                relevance -= torch.cosine_similarity(patches, text[None], dim=-1) / len(segments)
            assert record.kept.tolist() == cdpruner(plain, 7, words, relevance)


def test_a_folder_is_a_text_tower(clip, tmp_path):
    tower, tokenizer = clip
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    family = LLAVA_CLIP_GQA
    model, kept = family.build(torch.float32), []
    for source in (clip, tmp_path):
        with torch.no_grad(), vlmprune.pruned(model, "cdpruner", keep=7, text_tower=source, tokenizer=tokenizer):
            model(**family.inputs([[3, "A", 4]]))
            kept.append(vlmprune.last_run(model).images[0].kept.tolist())
    assert kept[0] == kept[1]


def test_a_text_tower_that_does_not_fit_is_refused(clip):
    tower, tokenizer = clip
    family = LLAVA_CLIP_GQA
    model = family.build(torch.float32)
    with pytest.raises(ParameterError, match=r'text_tower=None.*relevance="instruction"'):
        vlmprune.apply(model, "cdpruner")
    with pytest.raises(ParameterError, match="tokenizer=None"):
        vlmprune.apply(model, "cdpruner", text_tower=clip)
    with pytest.raises(ParameterError, match="a pair"):
        vlmprune.apply(model, "cdpruner", text_tower=tower, tokenizer=tokenizer)
    with pytest.raises(ParameterError, match="CLIPTextModel without"):
        vlmprune.apply(model, "cdpruner", text_tower=(tower.text_model, tokenizer), tokenizer=tokenizer)
    wide = CLIPModel(CLIPConfig(vision_config={**CLIP.to_dict(), "hidden_size": 48}, projection_dim=12))
    with (
        vlmprune.pruned(model, "cdpruner", keep=3, text_tower=(wide, tokenizer), tokenizer=tokenizer),
        pytest.raises(ParameterError, match="width 48, the features of this model have 32"),
    ):
        model(**family.inputs([[3, "A", 4]]))


def test_keywords_are_embedded_word_by_word():
    family, rows = LLAVA_CLIP_GQA, [[3, "A", 4]]
    model, inputs = family.build(torch.float32), family.inputs(rows)
    with torch.no_grad():
        plain = plain_image(model, family.image("A")["pixel_values"])
        (words,) = words_of(inputs, rows)
        with vlmprune.pruned(model, "mmtok", keep=9, tokenizer=tokenizer_of(130)):
            model(**inputs)
            kept = vlmprune.last_run(model).images[0].kept.tolist()
        assert kept == mmtok(plain, 9, model.get_input_embeddings()(words))
