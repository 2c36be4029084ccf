"""Methods that serve videos, on the layouts of videos with and without a newline at their end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.method_batches import check_selection, random_batch
from vlmprune.layout import raster_layout
from vlmprune.methods.baselines.uniform import even_frames
from vlmprune.methods.needs import STILL_IMAGES
from vlmprune.methods.registry import METHODS
from vlmprune.patches.families.llava_onevision import video_layout

SERVING = [name for name, cls in METHODS.items() if cls.site == "input" and STILL_IMAGES not in cls.needs]
sizes = st.integers(1, 5)


@st.composite
def videos(draw):
    """A video of several frames, as Qwen-VL or as OneVision has it."""
    frames = draw(st.integers(2, 6))
    if draw(st.booleans()):
        return video_layout(frames, draw(sizes))
    return raster_layout(draw(sizes), draw(sizes), frames)


@pytest.mark.parametrize("name", SERVING)
@given(layouts=st.lists(videos(), min_size=1, max_size=3), keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 90)))
def test_budgets_are_met(name, layouts, keep):
    method = METHODS[name](keep=keep)
    batch = random_batch(method, [*layouts, raster_layout(2, 3)], 5)
    check_selection(method.select(batch), batch)


@given(frames=st.integers(1, 6), rows=sizes, columns=sizes, data=st.data())
def test_uniform_gives_every_frame_its_share(frames, rows, columns, data):
    budget = data.draw(st.integers(1, frames * rows * columns))
    kept = even_frames(frames, rows, columns, budget)
    assert len(kept.unique()) == budget
    shares = torch.bincount(kept // (rows * columns), minlength=frames)
    assert int(shares.max() - shares.min()) <= 1
