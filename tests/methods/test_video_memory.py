"""A video of 128 frames: what its selection allocates, and that nothing of it is a matrix of tokens times tokens."""

from dataclasses import replace

import pytest
import torch

from support.method_batches import WITHOUT_CLS, random_batch
from support.peak_memory import PeakMemory
from vlmprune.layout import raster_layout
from vlmprune.methods import PictureMethod
from vlmprune.methods.needs import STILL_IMAGES, VIDEOS
from vlmprune.methods.registry import METHODS, make_method
from vlmprune.patches.families.llava_onevision import video_layout
from vlmprune.patches.prefill.scored_items import choose_among, scored_items, visual_budget

# LLaVA-OneVision's 25,089 tokens with the newline, and 16,128 of Qwen2.5-VL: 256 frames in pairs of 9 x 14 tokens.
ONEVISION, QWEN = video_layout(128, 14), raster_layout(9, 14, 128)
# Tens of seconds on one core, as every token is compared with all later ones.
SLOW = {"textmonkey"}
SERVING = [
    pytest.param(name, marks=pytest.mark.whole if name in SLOW else ())
    for name, cls in METHODS.items()
    if cls.site == "input"
    and (VIDEOS in cls.needs or (issubclass(cls, PictureMethod) and STILL_IMAGES not in cls.needs))
]


def peak_of(name, layout, dim, keep):
    """Return what `PeakMemory` counts of one selection, and its number of kept tokens."""
    parameters = {"relevance": False} if name == "todre" else {}
    method = make_method(name, keep=keep, **parameters)
    budget = visual_budget(method, layout, "video")
    batch = random_batch(method, [layout], 0, WITHOUT_CLS)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(layout.total, dim, generator=generator).bfloat16()
    batch = replace(batch, features=features, budgets=(budget,), modalities=("video",))
    items = scored_items(method, batch.layouts, batch.modalities, batch.budgets)
    with PeakMemory() as memory:
        selection = choose_among(method, batch, items)
    return memory, selection.counts[0]


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("layout", [ONEVISION, QWEN], ids=["onevision", "qwen2.5-vl"])
def test_no_matrix_of_all_tokens(name, layout):
    memory, kept = peak_of(name, layout, 32, 0.02)
    assert 0 < kept < layout.total // 4
    # A quarter byte a pair of tokens: no such matrix would fit, not even of bits and a half.
    assert memory.largest < layout.total**2 // 4
    assert memory.peak < layout.total**2


@pytest.mark.parametrize(
    ("name", "times"), [("evs", 1), ("vidcom2", 1), ("holitom", 1.5), ("fastvid", 3), ("flashvid", 4.5)]
)
@pytest.mark.parametrize("layout", [ONEVISION, QWEN], ids=["onevision", "qwen2.5-vl"])
def test_methods_for_time_need_few_times_the_features_themselves(name, times, layout):
    """Of 128 frames eight are in fp32 at a time; methods that merge hold what they make in fp32."""
    dim = 896
    memory, _ = peak_of(name, layout, dim, 0.25)
    assert memory.peak < times * layout.total * dim * 2


def test_the_counter_sees_a_matrix_of_all_tokens():
    rows = torch.randn(500, 8)
    with PeakMemory() as memory:
        (rows @ rows.T).argmax()
    assert memory.peak >= memory.largest == 4 * 500**2
