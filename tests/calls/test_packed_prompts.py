"""Several prompts in one row, told apart by position ids: each gives what it gives alone, or the call is refused."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.llava_next import CASES as LLAVA_NEXT
from support.families.qwen2_5_vl import CASES as QWEN25_VL
from support.families.qwen2_vl import CASES as QWEN2_VL
from support.families.qwen3_vl import CASES as QWEN3_VL
from support.flash_on_cpu import flash_on_cpu
from support.matrix import METHOD_PARAMETERS
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from vlmprune.errors import UnsupportedCallError

PLAIN = [LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED, *LLAVA_NEXT]
MROPE = [*QWEN2_VL, *QWEN25_VL, *QWEN3_VL]
PROMPTS = [[3, "A", 4], [5], [2, "small", 1, "large", 6], [1, "B", 2]]
METHODS = ["divprune", "fastervlm", "pool", "uniform"]


def packed(case, model, axes=4):
    """Return the prompts in one row, and what each is alone."""
    alone = [case.inputs([prompt]) for prompt in PROMPTS]
    positions = []
    for prompt in alone:
        tokens = torch.arange(prompt["input_ids"].shape[1])[None]
        ids = case.positions(model, prompt)
        positions.append(torch.cat([tokens[None], ids.expand(3, 1, -1)]) if axes == 4 else tokens)
    row = {
        key: torch.cat([prompt[key] for prompt in alone if key in prompt], 0 if "pixel" in key or "grid" in key else 1)
        for key in alone[0]
        if key not in ("attention_mask", "image_sizes")
    }
    if "image_sizes" in alone[0]:
        row["image_sizes"] = torch.cat([prompt["image_sizes"] for prompt in alone if "image_sizes" in prompt])
    return {**row, "position_ids": torch.cat(positions, -1), "use_cache": False}, alone


def check_prompts(model, row, alone):
    logits, start = model(**row).logits[0], 0
    for prompt in alone:
        width = prompt["input_ids"].shape[1]
        torch.testing.assert_close(logits[start : start + width], model(**prompt).logits[0], atol=2e-5, rtol=1e-4)
        start += width
    assert start == len(logits)


@pytest.mark.parametrize(
    ("method", "case"),
    [(method, case) for case in [*PLAIN, *MROPE] for method in METHODS if method != "pool" or case not in LLAVA_NEXT],
    ids=str,
)
def test_packed_prompts_are_what_they_are_alone(case, method):
    model = case.build(torch.float32)
    row, alone = packed(case, model, 4 if case in MROPE else 1)
    with torch.no_grad():
        check_prompts(model, row, alone)
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            check_prompts(model, row, alone)
            model(**row)
            run = vlmprune.last_run(model)
            assert [len(image.kept) < image.total for image in run.images] == [True] * 4


@pytest.mark.parametrize("case", MROPE, ids=str)
def test_packed_prompts_close_their_own_gaps(case):
    model = case.build(torch.float32)
    row, alone = packed(case, model)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3, positions="compact"):
        check_prompts(model, row, alone)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_backends_see_the_packing(implementation):
    case = LLAVA_CLIP_GQA
    model = case.build(torch.float32)
    row, _ = packed(case, model, 1)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        expected = model(**row).logits
        previous = model.config._attn_implementation
        model.model.language_model.set_attn_implementation(implementation)
        try:
            torch.testing.assert_close(model(**row).logits, expected, atol=2e-5, rtol=1e-4)
        finally:
            model.model.language_model.set_attn_implementation(previous)


@pytest.mark.parametrize("case", QWEN3_VL, ids=str)
def test_plain_positions_where_the_host_packs_by_them(case):
    model = case.build(torch.float32)
    row, alone = packed(case, model, 1)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        logits, start = model(**row).logits[0], 0
        for prompt in alone:
            width = prompt["input_ids"].shape[1]
            single = model(**prompt, position_ids=torch.arange(width)[None]).logits[0]
            torch.testing.assert_close(logits[start : start + width], single, atol=2e-5, rtol=1e-4)
            start += width


def test_boundaries_for_flash_attention_move_with_the_tokens():
    case = LLAVA_CLIP_GQA
    model = case.build(torch.float32)
    row, alone = packed(case, model, 1)
    lengths = [prompt["input_ids"].shape[1] for prompt in alone]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    caught = []
    row |= {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=10):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True
        )
        try:
            check_prompts(model, row, alone)
        finally:
            handle.remove()
    assert caught[0]["cu_seq_lens_q"].tolist() == [0, 17, 22, 51, 64]
    assert caught[0]["cu_seq_lens_k"].dtype == torch.int32
    assert caught[0]["max_length_q"] == 29
    assert caught[0]["position_ids"].tolist() == [[*range(17), *range(5), *range(29), *range(13)]]


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("case", [LLAVA_CLIP_GQA, QWEN3_VL[0], QWEN25_VL[0]], ids=str)
def test_flash_attention_tells_packed_prompts_apart(case, bounds):
    model = case.build(torch.float32)
    row, alone = packed(case, model, 4 if case in MROPE else 1)
    row["use_cache"] = True
    if bounds:
        lengths = [prompt["input_ids"].shape[1] for prompt in alone]
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        row |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        row |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    with torch.no_grad(), flash_on_cpu(model.model.language_model):
        check_prompts(model, row, alone)
        with vlmprune.pruned(model, "divprune", keep=0.3):
            check_prompts(model, row, alone)


def test_what_cannot_be_packed_is_refused():
    case = deeper(LLAVA_CLIP_GQA)
    model = case.build(torch.float32)
    row, _ = packed(case, model, 1)
    two_rows = {key: torch.cat([value, value]) for key, value in row.items() if key != "use_cache"}
    two_rows["input_ids"][1, :3] = case.inputs([[3]])["input_ids"]
    with torch.no_grad():
        with (
            vlmprune.pruned(model, "fastv", layer=1, keep=0.6),
            pytest.raises(UnsupportedCallError, match="last token"),
        ):
            model(**row)
        with (
            vlmprune.pruned(model, "divprune", keep=0.6, positions="original"),
            pytest.raises(UnsupportedCallError, match='positions="original" leaves gaps'),
        ):
            model(**row)
        with vlmprune.pruned(model, "divprune", keep=0.6):
            cache = model(**case.inputs([[4]]), use_cache=True).past_key_values
            behind = {**row, "position_ids": row["position_ids"] + 4}
            with pytest.raises(UnsupportedCallError, match="behind 4 tokens in the cache"):
                model(**{**behind, "use_cache": True}, past_key_values=cache)
            with (
                vlmprune.options(model, keep=[0.5, 0.2]),
                pytest.raises(UnsupportedCallError, match="cannot be padded"),
            ):
                model(**two_rows, use_cache=False)


def test_whole_packed_prompts_are_left_alone():
    case = deeper(LLAVA_CLIP_GQA)
    model = case.build(torch.float32)
    row, _ = packed(case, model, 1)
    with torch.no_grad():
        expected = model(**row).logits
        for method in ("divprune", "fastv", "pyramiddrop"):
            with vlmprune.pruned(model, method, keep=1.0):
                assert torch.equal(model(**row).logits, expected)


def test_caches_of_packed_prompts_cannot_be_continued():
    case = LLAVA_CLIP_GQA
    model = case.build(torch.float32)
    row, _ = packed(case, model, 1)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        cache = model(**{**row, "use_cache": True}).past_key_values
        with pytest.raises(UnsupportedCallError, match="several prompts packed in one row"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
