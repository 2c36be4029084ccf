"""Choosing visual tokens before the first layer of the language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import ge
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.batch import Instruction, VisionSignal, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import FIRST_LAYER, INSTRUCTION, VIDEOS
from vlmprune.methods.pipeline import check_call

from ..call_options import RowPipelines
from ..calls import CallStack, LanguageModelCall
from ..coordinates import mean_coordinates
from ..families.family import Family
from ..hooks import HookSet
from ..tower.encoded_visuals import LiveEncodings
from ..tower.encoder_calls import watch_encoders
from ..tower.pixel_choice import KEPT_PIXELS
from ..tower.tower_tokens import merged_selection
from .entry_cut import EntryCut, plan_entry, whole_entry
from .first_layer import first_layer, read_questions
from .given_mask import check_needs_no_tower, given_visuals
from .image_spans import columns_of
from .inputs import compacted_inputs
from .instructions import end_token_ids, read_instructions, special_token_ids
from .merged_choice import choose_among_merged
from .packing import packed_prompts
from .scored_items import choose_among, scored_items, visual_budget
from .sequence_bounds import one_sequence, padding_before
from .visuals import PrefillVisuals, read_signals, read_visuals


class InputSite:
    """The hooks on the encoders, and the selection at the language model's entry.

    Attributes:
        method: what selects.
        compact: whether positions close the gaps of dropped tokens.
        later_signals: tower attention that a method at a later site reads.
        live: the encodings that prefills may still use.
    """

    def __init__(
        self,
        family: Family,
        method: InputMethod,
        calls: CallStack,
        compact: bool,
        later_signals: Sequence[VisionSignal] = (),
    ) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.compact = compact
        self.later_signals = later_signals
        self.live = LiveEncodings()

    @property
    def signals(self) -> tuple[VisionSignal, ...]:
        """The tower attention that the method reads."""
        return self.method.vision_signals(self.family.tower_facts)

    @property
    def watched_signals(self) -> tuple[VisionSignal, ...]:
        """The tower attention that is read here or at a later site."""
        return tuple(dict.fromkeys((*self.signals, *self.later_signals)))

    @property
    def signal(self) -> str | None:
        """What the method scores by, in words."""
        return ", ".join(f"{signal.kind} layer {signal.layer}" for signal in self.signals) or None

    def install(self, hooks: HookSet, check_inputs: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        """Register the hooks on encoders and vision tower; `check_inputs` refuses arguments of an encoder's call."""
        watch_encoders(self.family, self.watched_signals, self.calls, self.live, hooks, check_inputs)

    def visuals(self, call: LanguageModelCall, mask: Tensor | None) -> PrefillVisuals | None:
        """Return the images and videos of a call, None where it has none.

        Args:
            call: the call in the caller's columns.
            mask: where visual tokens are that the caller merged by hand, or None.

        Raises:
            UnsupportedCallError: features that were made without the applied method, or that it cannot know of.
            LayoutError: placeholders and features, or the mask and the call, do not fit together.
        """
        given = None if mask is None else given_visuals(call, mask)
        if given is not None:
            return given
        if call.model_call.has_visuals:
            return read_visuals(self.family, call.model_call, self.watched_signals, self.live)
        if call.model_call.visual_mask is not None:
            raise UnsupportedCallError(
                f"Pixels were given, but {type(self.family.multimodal_model).__name__} did not encode them where "
                "vlmprune watches it: it was wrapped or changed since `apply`. Call vlmprune.remove(model) and apply again."
            )
        return None

    def begin_prefill(self, call: LanguageModelCall, visuals: PrefillVisuals, pipelines: RowPipelines) -> EntryCut:
        """Return what enters the language model.

        Args:
            call: the call in the caller's columns.
            visuals: the images.
            pipelines: the methods as they run in each row.

        Raises:
            BudgetError: budgets for another number of rows than the call has.
            UnsupportedCallError: something is to be dropped, and the call's mask is not two-dimensional, or the method needs
                more than tokens that were merged by hand, or reads other tower layers than the call takes features from.
            UnsupportedMethodError: something is to be dropped, and the method cannot serve a video that the call holds, or
                serves videos alone and the call holds none.
            LayoutError: something is to be dropped, and the method cannot choose among the frames of a video.
        """
        spans = visuals.spans
        merged = merged_selection(visuals)
        modalities = visuals.modalities
        budgets = tuple(
            visual_budget(pipelines.row(row, call.batch).at_input, visuals.layouts[image], modalities[image])
            for row, image in zip(spans.rows, spans.unique, strict=True)
        )
        if merged is None and budgets == spans.counts:
            self._check_whole(visuals)
            self._check_no_images_alone(call, visuals, pipelines)
            return whole_entry(call, spans)
        call.check_mask()
        shown = tuple(budgets[image] for image in spans.first_of)
        if merged is not None and all(map(ge, shown, merged.counts)):
            return plan_entry(call, spans, merged)
        # Methods that differ by row differ in their budgets alone, which the batch carries.
        method = pipelines.row(spans.rows[0], call.batch).at_input
        if not visuals.encoded:
            check_needs_no_tower(method, self.family.tower_facts)
        check_call(method, modalities, self.family)
        self._check_layers(method, visuals)
        with torch.no_grad():
            batch = self._batch(call, visuals, shown)
            if merged is not None:
                return plan_entry(call, spans, choose_among_merged(method, batch, merged))
            items = scored_items(method, visuals.layouts, modalities, shown)
            return plan_entry(call, spans, choose_among(method, batch, items))

    def _check_no_images_alone(self, call: LanguageModelCall, visuals: PrefillVisuals, pipelines: RowPipelines) -> None:
        """Refuse a call of images that a method for videos would leave whole without a word."""
        for row, count in zip(visuals.spans.rows, visuals.spans.counts, strict=True):
            method = pipelines.row(row, call.batch).at_input
            if VIDEOS in method.needs and method.budget(count) < count:
                check_call(method, visuals.modalities, self.family)

    def _coordinates(self, call: LanguageModelCall, visuals: PrefillVisuals) -> Tensor:
        padding, spans = padding_before(call), visuals.spans
        positions = call.positions if padding is None else call.positions - padding[:, None]
        return mean_coordinates(
            self.family, positions.flatten(-2)[..., columns_of(spans.first_of, spans).to(call.device)]
        )

    def _check_whole(self, visuals: PrefillVisuals) -> None:
        for shown in visuals.encoded:
            kept = shown.visuals.vision.get(KEPT_PIXELS)
            if kept is not None and not bool(kept.all()):
                raise UnsupportedCallError(
                    f"The images were encoded without the tokens that {self.method.name!r} dropped before the tower, and this "
                    "call asks for all of them. Encode and call the model with the same keep."
                )

    def _check_layers(self, method: InputMethod, visuals: PrefillVisuals) -> None:
        for shown in visuals.encoded if self.signals else ():
            changed = self.family.changed_features(shown.visuals.inputs)
            if changed is not None:
                raise UnsupportedCallError(
                    f"{changed} was given for this call, and {method.name!r} reads the vision tower by the configured one. Set "
                    "it in model.config before vlmprune.apply, or apply a method that does not read the tower."
                )

    def compacted(self, call: LanguageModelCall, visuals: PrefillVisuals, cut: EntryCut) -> dict[str, Any]:
        """Return the language model's arguments after `cut`, which drops something."""
        call.entry = cut.compaction
        prompts = packed_prompts(call, text_axis=self.family.text_positions)
        arguments, call.left_behind = compacted_inputs(
            call, cut, visuals.spans, prompts, self.method.name, close_gaps=self.compact, mrope=self.family.mrope
        )
        if prompts is None and not self.compact and not self.family.mrope and call.batch == 1:
            assert cut.compaction is not None
            width = cut.compaction.width
            arguments |= one_sequence(self.family.language_model, width, call.past + width, call.device)
        return arguments

    def _batch(self, call: LanguageModelCall, visuals: PrefillVisuals, budgets: tuple[int, ...]) -> VisualBatch:
        family, spans = self.family, visuals.spans
        shown = spans.first_of
        columns = columns_of(shown, spans).to(call.device, non_blocking=True)
        vision, tile_vision = read_signals(family, self.signals, visuals.encoded, self.method.needs, call.device)
        return VisualBatch(
            features=call.tokens.detach().flatten(0, 1)[columns],
            counts=tuple(spans.counts[image] for image in shown),
            budgets=budgets,
            layouts=visuals.layouts,
            tower=family.tower_facts,
            vision=vision,
            tile_vision=tile_vision,
            project=family.project,
            projector_layers=family.projector_layers,
            instructions=self._instructions(call, visuals) if INSTRUCTION in self.method.needs else (),
            embed=self._embed,
            first_layer=first_layer(family) if FIRST_LAYER in self.method.needs else None,
            questions=self._questions(call, visuals) if FIRST_LAYER in self.method.needs else (),
            modalities=tuple(visuals.modalities),
            coordinates=self._coordinates(call, visuals) if self.method.keep_positions else None,
        )

    def _questions(self, call: LanguageModelCall, visuals: PrefillVisuals) -> tuple[Tensor, ...]:
        config, model = self.family.config, self.family.model
        turn_end = self._embeddable(
            end_token_ids(config, config.get_text_config(), getattr(model, "generation_config", None))
        )
        prompts = packed_prompts(call, text_axis=self.family.text_positions)
        image_end = getattr(config, "vision_end_token_id", None)
        return read_questions(call, visuals.spans, image_end, turn_end, self._embed, prompts)

    def _instructions(self, call: LanguageModelCall, visuals: PrefillVisuals) -> tuple[Instruction, ...]:
        model = self.family.model
        config = self.family.config
        special = self._embeddable(
            special_token_ids(config, config.get_text_config(), getattr(model, "generation_config", None))
        )
        prompts = packed_prompts(call, text_axis=self.family.text_positions)
        return read_instructions(call, visuals.spans, special, self._embed, prompts)

    def _embeddable(self, ids: frozenset[int]) -> frozenset[int]:
        table: Any = self.family.multimodal_model.get_input_embeddings()  # type: ignore[operator]
        return frozenset(token for token in ids if 0 <= token < table.num_embeddings)

    def _embed(self, ids: Tensor) -> Tensor:
        table: Any = self.family.multimodal_model.get_input_embeddings()  # type: ignore[operator]
        embedded: Tensor = table(ids.to(table.weight.device))
        return embedded.detach()
