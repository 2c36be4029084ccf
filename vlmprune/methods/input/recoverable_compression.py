"""Recoverable Compression: outliers of attention, tokens that the text recovers, and the rest merged into a few."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.adaptive_method import AdaptiveMethod
from vlmprune.methods.batch import Instruction, Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice
from vlmprune.methods.needs import CLS_TOKEN, INSTRUCTION, STILL_IMAGES, TOWER_ATTENTION, TOWER_FEATURES, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.contrastive import ContrastiveTower
from vlmprune.methods.shared.features import features_signal
from vlmprune.methods.shared.tile_segments import even_counts, tile_segments, to_device
from vlmprune.methods.shared.words import question_text

from .recoverable_compression_tile import SIMILARITY_SCALE, TileChoice, choose_in_tile, merging


@dataclass(frozen=True, kw_only=True)
class RecoverableCompression(AdaptiveMethod):
    """Keep the outliers of attention, then those of the similarity to the text, and merge the rest into a few centres.

    In every tile: of the CLS attention of the last tower layer (all heads taken as one) as many of the highest are
    kept as its local outlier factor (20 neighbours) finds outliers, of the similarity to the text likewise. Of the
    remaining tokens the highest by attention are centres, their number by the outliers among them (10 neighbours); a
    centre is its features plus those of the 32 tokens with the highest `cosine of keys + 50 * similarity`, weighted
    by their attention. One extra token is the attention-weighted sum of the remaining tokens that are no centre.
    Features are those before the projector, which then takes the merged ones. Newlines are dropped.

    Merged tokens keep the centre's position, the extra token takes that of the last remaining token, and all come in
    position order; `order="official"` puts kept tokens, centres by falling attention, and the extra one behind each
    other tile by tile, as values in the same positions.

    `keep=None` (the default) keeps what the outliers say, about a tenth. A given `keep` is met exactly: every tile
    keeps the same number of tokens, one of them the extra token (if it keeps two or more), the others shared out over
    attention, text and centres in proportion to what the outliers say (to attention alone where they say nothing). A
    tile whose tokens are all kept is left as it is.

    The similarity to the text is `relevance="contrastive"` as published (the cosine of CLIP's projections; it needs
    `text_tower`, the CLIP model that the vision tower was taken from, and `tokenizer`, the model's own), or by name
    the substitute `relevance="instruction"`, the cosine of the visual token and the mean embedding of the instruction
    in the language model's space, which is not the published method.

    Source: "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information", AAAI
    2025, arXiv 2409.01179. `mode="code"` takes from the official code that the number of centres is that share of the
    features' width and not of the remaining tokens, that keys of the remaining tokens are looked up as if these were
    the first ones, and that the text's embedding is that of the last padded place. `mode="fixed"` does as the paper
    says. Other than the official code, both take the question for the text (that code takes the prompt's first line,
    which in LLaVA is the system prompt), and neither normalizes.

    Attributes:
        mode: "code" or "fixed".
        relevance: "contrastive" or "instruction".
        text_tower: folder or name of a CLIP model, or a pair (CLIPModel, its tokenizer).
        tokenizer: the model's tokenizer (or processor), which decodes the prompt.
        order: "position" or "official".
    """

    mode: Literal["code", "fixed"] = "code"
    relevance: Literal["contrastive", "instruction"] = "contrastive"
    text_tower: Any = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    order: Literal["position", "official"] = "position"

    name: ClassVar[str] = "recoverable_compression"
    needs: ClassVar[frozenset[Need]] = frozenset(
        {STILL_IMAGES, TOWER_ATTENTION, TOWER_FEATURES, CLS_TOKEN, INSTRUCTION}
    )
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("code", "fixed"))
        check_choice("relevance", self.relevance, ("contrastive", "instruction"))
        check_choice("order", self.order, ("position", "official"))

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for attention and keys of the last layer, the features, and the last layer's output for contrastive relevance.

        Raises:
            ParameterError: contrastive relevance without a text tower or tokenizer.
        """
        last = tower.layers - 1
        signals = (VisionSignal("cls_attention_one_head", last), VisionSignal("keys", last), features_signal(tower))
        if self.relevance == "instruction":
            return signals
        for name in ("text_tower", "tokenizer"):
            if getattr(self, name) is None:
                raise ParameterError(
                    f'{name}=None; relevance="contrastive" needs a text tower and the model\'s tokenizer; nearest that needs '
                    'neither: relevance="instruction".'
                )
        self._tower  # noqa: B018
        return (*signals, VisionSignal("states", last))

    @cached_property
    def _tower(self) -> ContrastiveTower:
        return ContrastiveTower(self.text_tower)

    def select(self, batch: VisualBatch) -> Selection:
        """Keep what the images ask for, or `budgets[i]` tokens of each."""
        assert batch.project is not None
        segments, device = tile_segments(batch.layouts), batch.features.device
        width = segments.sizes.shape[1]
        order = to_device(segments.order, device)
        counts = even_counts(segments, batch.budgets).flatten().tolist()
        attention, keys, features = (batch.vision[signal] for signal in self.vision_signals(batch.tower)[:3])
        choices: list[tuple[Tensor, TileChoice]] = []
        for segment, (begin, end) in enumerate(pairwise(segments.offsets)):
            image, tile = divmod(segment, width)
            count = None if self.keep is None else counts[segment]
            if begin == end or count == 0 or (tile == width - 1 and count is None):
                continue
            tokens = order[begin:end]
            if tile == width - 1 or count == end - begin:
                every = torch.arange(count or 0, device=device)
                choices.append((tokens, TileChoice(image, every, every[:0], None, every[:0], every[:0], every[:0])))
                continue
            similarity = self._similarity(batch, batch.instructions[image], tokens)
            chosen = choose_in_tile(
                attention[tokens, 0], keys[tokens], similarity, features.shape[1], count, code=self.mode == "code"
            )
            choices.append((tokens, chosen._replace(image=image)))
        return self._assembled(batch, features, attention[:, 0], choices)

    def feature_macs(self, scored: Scored) -> int:
        """The projector's second run, on a tenth of the kept tokens, say: images decide. Cosines of keys are left out."""
        return sum(kept // 10 for total, kept in scored.images if kept < total) * scored.projector

    def _similarity(self, batch: VisualBatch, instruction: Instruction, tokens: Tensor) -> Tensor:
        if self.relevance == "instruction":
            mean = instruction.embeddings.float().mean(0)
            return torch.cosine_similarity(batch.features[tokens].float(), mean[None], dim=-1) * SIMILARITY_SCALE
        if instruction.ids is None:
            raise ParameterError(
                "The call has embeddings in place of token ids, so the question cannot be read; allowed: input_ids, or "
                'relevance="instruction".'
            )
        decode = getattr(self.tokenizer, "tokenizer", self.tokenizer).decode
        question = question_text(decode(instruction.ids.tolist(), skip_special_tokens=True))
        states = batch.vision[VisionSignal("states", batch.tower.layers - 1)][tokens]
        is_code = self.mode == "code"
        patches = self._tower.patches(states, normed=not is_code)
        text = self._tower.last_place(question, states.device) if is_code else self._tower.text(question, states.device)
        return torch.cosine_similarity(patches, text.mean(0)[None], dim=-1) * SIMILARITY_SCALE

    def _assembled(
        self, batch: VisualBatch, features: Tensor, attention: Tensor, choices: list[tuple[Tensor, TileChoice]]
    ) -> Selection:
        assert batch.project is not None
        device, total = batch.features.device, sum(batch.counts)
        factors = [merging(choice, attention[tokens]) for tokens, choice in choices]
        merged = torch.cat([rows @ features[tokens] for rows, (tokens, _) in zip(factors, choices, strict=True)])
        table = torch.cat([batch.features, batch.project(merged).to(batch.features.dtype)])
        places, sources, images, groups = [], [], [], torch.full((total,), -1, device=device)
        first = 0
        for rows, (tokens, choice) in zip(factors, choices, strict=True):
            main = tokens[choice.main]
            at = tokens[choice.remaining[torch.cat([choice.centres, choice.others[-1:]])]]
            places += [main, at]
            sources += [main, total + first + torch.arange(len(at), device=device)]
            first += len(at)
            images += [choice.image] * (len(main) + len(at))
            # A token that goes into several merged ones counts for the first; outputs are numbered later.
            number = len(images) - len(at)
            groups[main] = torch.arange(number - len(main), number, device=device)
            if len(rows):
                goes, into = (rows > 0).any(0), (rows > 0).int().argmax(0)
                groups[tokens[goes]] = number + into[goes]
            groups[at] = number + torch.arange(len(at), device=device)
        position, source = torch.cat(places), torch.cat(sources)
        counts = tuple(images.count(image) for image in range(len(batch.counts)))
        by_position = position.argsort()
        order = by_position if self.order == "position" else torch.arange(len(position), device=device)
        place_of = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
        begins = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        image_of = torch.tensor(images)
        place_of = place_of - to_device(begins[image_of], device)
        groups = torch.where(groups >= 0, place_of[groups.clamp(min=0)], -1)
        chosen = source[order]

        def merge(deep: Tensor) -> Tensor:
            parts = [
                rows.to(deep.device) @ deep[tokens.to(deep.device)].float()
                for rows, (tokens, _) in zip(factors, choices, strict=True)
            ]
            return torch.cat([deep, torch.cat(parts).to(deep.dtype)])[chosen.to(deep.device)]

        starts = to_device(torch.tensor(batch.offsets)[image_of], device)[by_position]
        return Selection(position[by_position] - starts, counts, table[chosen], merge, groups)
