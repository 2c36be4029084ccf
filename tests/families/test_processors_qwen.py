"""The real processors of Qwen2-VL and Qwen2.5-VL on photographs of many sizes, end to end through `generate`."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.real_processors import photograph, qwen_processor, with_patches
from support.families.rotary import alive_columns, rotary_positions
from support.oracle import suppressed

GREEDY = {"max_new_tokens": 4, "do_sample": False}
MARK = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = MARK + "what is shown here ?"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + MARK + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "page",
    "text",
    "coins",
    "logo",
    "hubble_deep_field",
)
SETUPS = {"qwen2-vl": (QWEN2_VL, "Qwen2VLProcessor"), "qwen2.5-vl": (QWEN2_5_VL, "Qwen2_5_VLProcessor")}


@pytest.fixture(params=SETUPS.values(), ids=SETUPS)
def setup(request):
    """A tiny model with patches of 14 x 14 pixels, and the processor of its family."""
    case, name = request.param
    return with_patches(case, 14), qwen_processor(name)


def picture(name):
    """A photograph as PIL image; some are grey, one is transparent."""
    return Image.fromarray(photograph(name))


def generate(model, inputs, method="fastervlm", keep=0.3):
    with torch.no_grad(), vlmprune.pruned(model, method, keep):
        new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        return new, vlmprune.last_run(model)


def check_geometry(image, grid, keep):
    frames, rows, columns = grid.tolist()
    assert frames == 1
    assert image.grid == (rows // 2, columns // 2)
    assert image.total == rows * columns // 4
    assert len(image.kept) == max(1, round(keep * image.total))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(setup, name):
    model, processor = setup
    inputs = processor(text=[PROMPT], images=[picture(name)], return_tensors="pt")
    new, record = generate(model, inputs)
    assert new.shape == (1, 4)
    (image,) = record.images
    check_geometry(image, inputs["image_grid_thw"][0], 0.3)
    assert record.text_tokens == [inputs["input_ids"].shape[1] - image.total]
    assert len(processor.batch_decode(new)) == 1


def test_shapes_from_tall_to_wide(setup):
    """Crops of a photograph, whose windows end at other places each."""
    model, processor = setup
    pixels = photograph("coffee")
    grids = set()
    for height, width in ((28, 28), (40, 400), (400, 40), (90, 130), (130, 90), (300, 60), (399, 599), (57, 111)):
        inputs = processor(
            text=[PROMPT], images=[Image.fromarray(np.ascontiguousarray(pixels[:height, :width]))], return_tensors="pt"
        )
        _, record = generate(model, inputs)
        check_geometry(record.images[0], inputs["image_grid_thw"][0], 0.3)
        grids.add(record.images[0].grid)
    assert len(grids) >= 6


@pytest.mark.parametrize("longest", [90 * 90, 250 * 250])
def test_pixel_limits(setup, longest):
    model, processor = setup
    size = {"shortest_edge": 28 * 28, "longest_edge": longest}
    inputs = processor(text=[PROMPT], images=[picture("chelsea")], size=size, return_tensors="pt")
    _, record = generate(model, inputs)
    check_geometry(record.images[0], inputs["image_grid_thw"][0], 0.3)
    assert (record.images[0].total > 50) == (longest > 200 * 200)


@pytest.mark.parametrize("method", ["fastervlm", "divprune", "pool"])
def test_batch_of_two_equals_singles(setup, method):
    model, processor = setup
    texts = [PROMPT, MARK + "describe the picture and " + MARK + "."]
    pictures = [picture("rocket"), picture("text"), picture("astronaut")]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    together, record = generate(model, batch, method)
    assert [image.batch_index for image in record.images] == [0, 1, 1]
    assert len({image.grid for image in record.images}) == 3
    kept = [image.kept.tolist() for image in record.images]
    for row, mine in enumerate((pictures[:1], pictures[1:])):
        single = processor(text=[texts[row]], images=mine, return_tensors="pt")
        alone, record = generate(model, single, method)
        assert alone[0].tolist() == together[row].tolist()
        assert [image.kept.tolist() for image in record.images] == [kept[:1], kept[1:]][row]


def test_keep_everything_is_the_model_itself(setup):
    model, processor = setup
    inputs = processor(text=[PROMPT], images=[picture("chelsea")], return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(generate(model, inputs, keep=1.0)[0], expected[:, -4:])


def test_positions_and_tokens_by_hand(setup):
    """The unpruned language model on the kept tokens with their own positions, after the whole prompt's."""
    model, processor = setup
    inputs = processor(text=[PROMPT], images=[picture("page")], return_tensors="pt")
    caught = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), rotary_positions(model) as plain:
        model(**inputs)
    handle.remove()
    new, record = generate(model, inputs, "divprune", 0.2)
    columns = alive_columns(inputs["input_ids"], inputs["attention_mask"], record, 0)
    ids = plain[0][:, 0]
    table = torch.cat([caught[0][0, columns], model.get_input_embeddings()(new[0, :3]).detach()])
    ids = torch.cat([ids[:, columns], ids.max() + 1 + torch.arange(3).expand(3, -1)], 1)
    with torch.no_grad():
        output = model.model.language_model(inputs_embeds=table[None], position_ids=ids[:, None], use_cache=False)
        logits = model.lm_head(output.last_hidden_state)[0, -4:]
    assert suppressed(logits).argmax(-1).tolist() == new[0].tolist()


def test_chat_template(setup):
    model, processor = setup
    processor.chat_template = TEMPLATE
    parts = [{"type": "image", "image": picture("coins")}, {"type": "text", "text": "what is shown here ?"}]
    chat = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    plain = processor(text=[PROMPT], images=[picture("coins")], return_tensors="pt")
    assert inputs["input_ids"].tolist() == plain["input_ids"].tolist()
    assert generate(model, inputs)[0].tolist() == generate(model, plain)[0].tolist()


def test_text_only_prompt(setup):
    model, processor = setup
    inputs = processor(text=["what is shown here ?"], return_tensors="pt")
    with torch.no_grad():
        expected = model.generate(**inputs, **GREEDY)[:, -4:]
    new, record = generate(model, inputs)
    assert torch.equal(new, expected)
    assert record.images == []


def test_second_turn_made_by_the_processor(setup):
    """The whole chat goes through the processor again; the cache holds the picture."""
    model, processor = setup
    first = processor(text=[PROMPT], images=[picture("chelsea")], return_tensors="pt")
    longer = processor(text=[PROMPT + "yes describe the picture"], images=[picture("chelsea")], return_tensors="pt")
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.3):
        scratch = model.generate(**longer, **GREEDY)
        cache = model(**first, use_cache=True).past_key_values
        text = {key: longer[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        continued = model.generate(**text, past_key_values=cache, **GREEDY)
    assert torch.equal(continued, scratch)
