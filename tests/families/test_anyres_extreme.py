"""Images so narrow that nothing but newlines is left of their crops, or nothing at all; images of one tile."""

import pytest

from support import method_batches as build
from support.matrix import REQUIRED
from vlmprune.methods.needs import GRID, TILES, WHOLE_TILES
from vlmprune.methods.registry import METHODS
from vlmprune.patches.families.anyres import AnyresImage, cropped_image

IMAGES = {
    "only-newlines": cropped_image((3, 1), 4, (4000, 1)),
    "only-newlines-before-interpolation": cropped_image((6, 1), 4, (4000, 1), 2),
    "no-crop-tokens": cropped_image((1, 3), 4, (1, 4000)),
    "one-tile": AnyresImage(4),
}
SERVED = [cls for cls in METHODS.values() if cls.site == "input" and GRID not in cls.needs]
VARIANTS = [
    *((cls, {"relevance": False} if cls.name == "todre" else REQUIRED.get(cls.name, {})) for cls in SERVED),
    *((cls, {"faithful": True}) for cls in SERVED if {TILES, WHOLE_TILES} & cls.needs),
]


def test_the_images_are_that_extreme():
    patches = {name: int((~image.layout.newline).sum()) for name, image in IMAGES.items()}
    assert set(patches.values()) == {16}
    assert {name: image.layout.total for name, image in IMAGES.items()} == {
        "only-newlines": 28,
        "only-newlines-before-interpolation": 40,
        "no-crop-tokens": 16,
        "one-tile": 17,
    }


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize(("cls", "parameters"), VARIANTS, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("keep", [1, 0.3, 0.9])
@pytest.mark.parametrize("tower", [build.WITH_CLS, build.WITHOUT_CLS], ids=["cls", "no-cls"])
def test_every_method_serves_them_beside_an_ordinary_image(name, cls, parameters, keep, tower):
    method = cls(keep=keep, **parameters)
    layouts = [IMAGES[name].layout, cropped_image((1, 2), 4, (30, 100)).layout]
    batch = build.random_batch(method, layouts, seed=1, tower=tower)
    selection = method.select(batch)
    if not parameters.get("faithful"):
        build.check_selection(selection, batch)
