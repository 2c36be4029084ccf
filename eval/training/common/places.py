"""Where things are: the targets of probes that ask the language model for it, and the probes.

Comparing two places is what the answers alone teach last. After some layers a shape's word is asked where the thing lies that
it names, and later the second shape's word of a question for the way to the first. Only training uses these heads.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .language import SLOT, WIDTH, Answers, Prompts
from .scenes import COLOUR_NAMES, SHAPES, Scene

NAMED, WAY = 3, 4
"""After how many layers each probe asks."""
SPREAD = 3.5
"""Factor that gives places in a picture (0 to 1) about unit variance."""


def name_places(scene: Scene, ids: list[int], prompts: Prompts) -> list[tuple[float, float]]:
    """Column and row (0 to 1) of the only thing that each token names, nan elsewhere."""
    nowhere = (float("nan"), float("nan"))
    places = [nowhere] * SLOT
    words = prompts.tokenizer.convert_ids_to_tokens(ids)
    for i, word in enumerate(words):
        if word not in SHAPES:
            continue
        colour = COLOUR_NAMES.index(words[i - 1]) if words[i - 1] in COLOUR_NAMES else None
        named = [t for t in scene.things if SHAPES[t.shape] == word and colour in (None, t.colour)]
        if len(named) == 1:
            places[i] = (named[0].x / scene.size, named[0].y / scene.height)
    return places


class Places(nn.Module):
    """Linear probes on the hidden states of the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.named, self.way = (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)) for _ in range(2))

    def forward(self, answers: Answers, places: Tensor) -> dict[str, Tensor]:
        """Mean squared errors, as shares of the places' variance; `places` is (batch, slots, `SLOT`, 2)."""
        known = ~places.isnan().any(-1)
        goal = (places.nan_to_num() - 0.5) * SPREAD
        named, way = (
            probe(answers.hidden[layer][:, answers.start :]).float().view_as(goal)
            for probe, layer in ((self.named, NAMED), (self.way, WAY))
        )
        pairs = known.sum(-1) == 2
        first = known.int().argmax(-1)
        second = SLOT - 1 - known.flip(-1).int().argmax(-1)

        def at(values: Tensor, place: Tensor) -> Tensor:
            return values.gather(2, place[..., None, None].expand(-1, -1, 1, 2))[:, :, 0][pairs]

        apart = at(goal, first) - at(goal, second)
        return {
            "place": F.mse_loss(named[known], goal[known]),
            "way": F.mse_loss(at(way, second), apart) / 2 if pairs.any() else named.sum() * 0,
        }
