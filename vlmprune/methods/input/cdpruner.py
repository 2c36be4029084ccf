"""CDPruner: tokens that have to do with the question and differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import ParameterError
from vlmprune.kernels.dpp_map import dpp_map
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import INSTRUCTION, STILL_IMAGES, TOWER_FEATURES, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.contrastive import ContrastiveTower
from vlmprune.methods.shared.features import features_signal, tower_features
from vlmprune.methods.shared.patches import patches_of
from vlmprune.methods.shared.tile_segments import even_counts, local_indices, tile_segments, to_device
from vlmprune.methods.shared.words import question_text


@dataclass(frozen=True, kw_only=True)
class CDPruner(InputMethod):
    """Keep the tokens that a determinantal point process conditioned on the question finds most likely together.

    Its matrix is `r_i * cosine_ij * r_j`, of the cosines of the visual tokens and their relevance r to the question;
    tokens are picked greedily, the most relevant one first. Relevance is scaled to 0..1 (plus a millionth) over all
    patches of an image. Every tile keeps the same number of tokens, as far as it has that many; newlines are dropped
    first. Kept tokens stay in raster order.

    `relevance="contrastive"` is the published one: the negative cosine (CLIP's similarity of patches and text is
    inverted) of the patch's and the question's CLIP embeddings, mean over segments of 77 tokens. It needs
    `text_tower`, the CLIP model that the vision tower was taken from, and `tokenizer`, the model's own, which gives
    the question back from the prompt. `similarity="direct"` does not turn the cosine round, for text towers whose patches
    resemble the words that name them. `relevance="instruction"` is a substitute that needs neither: the cosine of the
    visual token and the mean embedding of the instruction in the language model's space; it is not the published
    method.

    Source: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS
    2025, arXiv 2506.10967. The official code scales relevance over all images of the call, here over those of an
    image; where the rank of the matrix runs out it repeats tokens, here the rest follows by index; where all tokens
    are equally relevant it divides by 0, here diversity alone counts.

    Attributes:
        relevance: "contrastive" or "instruction".
        text_tower: folder or name of a CLIP model, or a pair (CLIPModel, its tokenizer).
        tokenizer: the model's tokenizer (or processor), which decodes the prompt.
        similarity: "inverted" or "direct", of contrastive relevance.
    """

    relevance: Literal["contrastive", "instruction"] = "contrastive"
    text_tower: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    similarity: Literal["inverted", "direct"] = "inverted"

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_FEATURES, INSTRUCTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("relevance", self.relevance, ("contrastive", "instruction"))
        check_choice("similarity", self.similarity, ("inverted", "direct"))

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the features where relevance is contrastive.

        Raises:
            ParameterError: contrastive relevance without a text tower or tokenizer.
        """
        if self.relevance == "instruction":
            return ()
        for name in ("text_tower", "tokenizer"):
            if getattr(self, name) is None:
                raise ParameterError(
                    f'{name}=None; relevance="contrastive" needs a text tower and the model\'s tokenizer; nearest that needs '
                    'neither: relevance="instruction".'
                )
        self._tower  # noqa: B018
        return (features_signal(tower),)

    @cached_property
    def _tower(self) -> ContrastiveTower:
        return ContrastiveTower(self.text_tower)

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        patches, device = patches_of(batch.layouts), batch.features.device
        indices = to_device(patches.indices, device)
        relevance = torch.zeros(len(batch.features), device=device)
        raw = self._raw_relevance(batch, indices)
        for begin, end in zip(patches.offsets, patches.offsets[1:], strict=False):
            relevance[indices[begin:end]] = scaled_relevance(raw[begin:end])
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets).flatten()
        picks = cdpruner_order(batch, relevance)
        starts = torch.tensor(segments.offsets[:-1]).repeat_interleave(counts)
        packed = to_device(segments.order, device)[picks + to_device(starts, device)]
        return Selection(local_indices(packed.sort().values, segments, batch.budgets), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs of a tile, those with the instruction; text tower and projections apart."""
        pairs = sum(total * total // scored.tiles for total, kept in scored.images if kept < total)
        return (pairs + sum(total for total, kept in scored.images if kept < total)) * scored.dim

    def _raw_relevance(self, batch: VisualBatch, indices: Tensor) -> Tensor:
        image = torch.arange(len(batch.counts)).repeat_interleave(torch.tensor(patches_of(batch.layouts).counts))
        parts = []
        if self.relevance == "instruction":
            for number, instruction in enumerate(batch.instructions):
                mean = normalize(instruction.embeddings.float().mean(0), dim=0)
                parts.append(normalize(batch.features[indices[image == number]].float(), dim=-1) @ mean)
            return torch.cat(parts)
        features = tower_features(batch)[indices]
        for number, instruction in enumerate(batch.instructions):
            if instruction.ids is None:
                raise ParameterError(
                    "The call has embeddings in place of token ids, so the question cannot be read; allowed: input_ids, or "
                    'relevance="instruction".'
                )
            decode = getattr(self.tokenizer, "tokenizer", self.tokenizer).decode
            question = question_text(decode(instruction.ids.tolist(), skip_special_tokens=True))
            embeddings = self._tower.patches(features[image == number])
            relevance = contrastive_relevance(embeddings, self._tower.text(question, features.device))
            parts.append(relevance if self.similarity == "inverted" else -relevance)
        return torch.cat(parts)


def contrastive_relevance(patches: Tensor, text: Tensor) -> Tensor:
    """Return the mean over the text's segments of the negative cosine, fp32 `[patches]`.

    Args:
        patches: `[patches, dim]`.
        text: `[segments, dim]`.
    """
    return -(normalize(patches.float(), dim=-1) @ normalize(text.float(), dim=-1).T).mean(-1)


def scaled_relevance(relevance: Tensor) -> Tensor:
    """Return `relevance [patches]` of one image between a little above 0 and a little above 1; 1 where it is all the same."""
    span = relevance.max() - relevance.min()
    return torch.where(span > 0, (relevance - relevance.min() + 1e-6) / span, 1.0)


def cdpruner_order(batch: VisualBatch, relevance: Tensor) -> Tensor:
    """Return the picks of every tile in the order in which they are made, int64 `[sum(budgets)]`, counted inside the tile.

    Args:
        batch: the images.
        relevance: fp32 `[tokens]`, from `scaled_relevance`; 0 at newlines.
    """
    segments = tile_segments(batch.layouts)
    order = to_device(segments.order, batch.features.device)
    counts = even_counts(segments, batch.budgets).flatten()
    return dpp_map(batch.features[order], segments.offsets, counts, weights=relevance[order])
