"""`prefill_chunk_size`: an image that lies in one chunk is pruned as ever; anything else is refused."""

import pytest
import torch
from transformers.generation import utils as generation_utils

import vlmprune
from support.matrix import FOLLOW_THE_QUESTION, METHOD_PARAMETERS, over_matrix
from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.registry import get_method
from vlmprune.patches.families.registry import find_family

# Older versions of transformers leave the images out, and cannot cut M-RoPE ids.
CHUNKS_HAVE_IMAGES = hasattr(generation_utils, "_slice_mm_encoder_output")
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def reads_on(method):
    return any(part.site == "layer" for part in get_method(method)().parts()) or method in FOLLOW_THE_QUESTION


@over_matrix
def test_chunks(method, family):
    model = family.build(torch.float32)
    image, text = family.inputs([[3, "A", 6]]), family.inputs([[19]])
    total = image["input_ids"].shape[1]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        if CHUNKS_HAVE_IMAGES or not find_family(model).mrope:
            wanted = model.generate(**text, **GREEDY)
            assert torch.equal(model.generate(**text, **GREEDY, prefill_chunk_size=8), wanted)
        with pytest.raises(UnsupportedCallError, match="prefill_chunk_size"):
            model.generate(**image, **GREEDY, prefill_chunk_size=8)
        wanted = model.generate(**image, **GREEDY)
        # The image and part of the question, then the rest of it.
        chunks = {"prefill_chunk_size": total - 3}
        if reads_on(method) or not CHUNKS_HAVE_IMAGES:
            with pytest.raises(UnsupportedCallError, match=r"what follows them|leaves the images out"):
                model.generate(**image, **GREEDY, **chunks)
        else:
            assert torch.equal(model.generate(**image, **GREEDY, **chunks), wanted)
            assert vlmprune.last_run(model).images[0].kept.numel() < family.tokens("A")
