"""The shipped checkpoints under vLLM keep the same tokens and answer the same as under transformers."""

from __future__ import annotations

import pytest

from support.served import CHECKPOINTS, Prompt, Reference, engine, scene_prompts

MODELS = ("tiny-qwen2.5-vl", "tiny-llava", "tiny-llava-next")
SETTINGS = (
    {"method": "divprune", "keep": 0.25},
    {"method": "fastervlm", "keep": 40},
    {"method": "uniform", "keep": 0.1},
)


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    return Reference(CHECKPOINTS / request.param), CHECKPOINTS / request.param


def prompts_of(folder):
    tall = (0,) if "llava" in folder.name else (0, 240, 336)
    *scenes, first, second = scene_prompts(8, tall=tall)
    two = Prompt(first.question, (*first.pictures, *second.pictures))
    return [*scenes, Prompt("Say something."), two]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["method"])
def test_same_tokens_and_answers(reference, setting):
    host, folder = reference
    prompts = prompts_of(folder)
    wanted = host.answers(prompts, **setting)
    # Of one method prompts are longer than a chunk.
    flags = {"max_num_batched_tokens": 64} if setting["method"] == "divprune" else {}
    with engine(folder, setting, **flags) as served:
        batch = served.answers(prompts, host.processor)
        assert batch.kept == wanted.kept
        assert batch.tokens == wanted.tokens
        again = served.answers(prompts, host.processor, one_by_one=True)
        # The cache of the encoder is as small as the chunks.
        assert flags or not again.kept, "pictures that were encoded are encoded again"
        assert again.tokens == wanted.tokens
