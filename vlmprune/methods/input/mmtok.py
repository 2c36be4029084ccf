"""MMTok: tokens that cover the words of the question and each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import Instruction, Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import INSTRUCTION, STILL_IMAGES, TOWER_FEATURES, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.features import features_signal, tower_features
from vlmprune.methods.shared.tile_segments import even_counts, local_indices, tile_segments, to_device
from vlmprune.methods.shared.words import keywords, question_text

from .mmtok_coverage import coverage_order, coverage_rows


@dataclass(frozen=True, kw_only=True)
class MMTok(InputMethod):
    """Keep tokens greedily, each with the highest gain in what the kept ones cover of the question's words and of all tokens.

    A token covers a word by the softmax, over the tokens of its tile, of the word's cosines to the visual tokens; it
    covers a token by the softmax of the cosines of their features before the projector. Words count 1 together,
    tokens `alpha`. Every tile keeps the same number of tokens, as far as it has that many; newlines are dropped
    first. Kept tokens stay in raster order; ties go to the lowest index.

    Words are embeddings of the language model's own table; no second tower is needed. With `tokenizer`, the model's
    own, they are those of the question without common words and answer formats, every word tokenized by itself, as in
    the official LLaVA code; without it, all tokens of the instruction.

    Source: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264. As
    in the official code, rows are normed in the dtype they come in. The official code keeps K tokens of every tile,
    and of all Qwen images of a call together `int(r * n)`; here `keep` counts the tokens of an image. Its LLaVA-1.5
    code never picks patches of the bars that make a picture square (`padding_patches` says which they are); a model
    does not know them, so here they can be picked.

    Attributes:
        alpha: weight of the tokens beside the words.
        text_temperature: t_tv of the paper; 0.02, and 0.01 where a visual token is made from several patches (Qwen),
            if not given.
        vision_temperature: t_vv of the paper.
        tokenizer: the model's tokenizer (or processor), for keywords instead of all tokens.
    """

    alpha: float = 0.5
    text_temperature: float | None = None
    vision_temperature: float = 0.2
    tokenizer: Any = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "mmtok"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_FEATURES, INSTRUCTION})
    symbols: ClassVar[Mapping[str, str]] = {"t_tv": "text_temperature", "t_vv": "vision_temperature"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "[0, inf)")
        if self.text_temperature is not None:
            check_number("text_temperature", self.text_temperature, "(0, inf)")
        check_number("vision_temperature", self.vision_temperature, "(0, inf)")

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the features."""
        return (features_signal(tower),)

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets)
        width = counts.shape[1]
        order = to_device(segments.order, batch.features.device)
        features = tower_features(batch)
        temperature = self.text_temperature
        if temperature is None:
            temperature = 0.02 if batch.tower.patches_per_token == 1 else 0.01
        words = [self._words(batch, instruction) for instruction in batch.instructions]
        kept = []
        for segment, ((begin, end), count) in enumerate(
            zip(pairwise(segments.offsets), counts.flatten().tolist(), strict=True)
        ):
            tokens = order[begin:end]
            if count == end - begin or segment % width == width - 1:
                kept.append(tokens[:count])
            elif count:
                rows = coverage_rows(
                    batch.features[tokens],
                    features[tokens],
                    words[segment // width],
                    self.alpha,
                    temperature,
                    self.vision_temperature,
                )
                kept.append(tokens[coverage_order(rows, count)])
        return Selection(local_indices(torch.cat(kept).sort().values, segments, batch.budgets), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs of a tile's features; those with the words, whose number is not known here, are left out."""
        pairs = sum(total * total // scored.tiles for total, kept in scored.images if kept < total)
        return pairs * scored.tower_dim

    def _words(self, batch: VisualBatch, instruction: Instruction) -> Tensor:
        if self.tokenizer is None:
            return instruction.embeddings
        if instruction.ids is None or batch.embed is None:
            raise ParameterError(
                "The call has embeddings in place of token ids, so the question cannot be read; allowed: input_ids, or "
                "tokenizer=None."
            )
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        question = question_text(tokenizer.decode(instruction.ids.tolist(), skip_special_tokens=True))
        ids: list[int] = tokenizer(keywords(question).split(), is_split_into_words=True)["input_ids"]
        if ids and ids[0] == getattr(tokenizer, "bos_token_id", None):
            ids = ids[1:]
        return batch.embed(torch.tensor(ids)).to(batch.features.device) if ids else instruction.embeddings
