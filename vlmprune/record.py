"""What a prefill kept: the record that `last_run` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .layout import VisualLayout


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image or video of a prefill.

    Attributes:
        batch_index: row of the batch (after the expansion for beams and return sequences).
        total: visual tokens before pruning.
        kept: int64 `[kept]`, indices into the image's own visual token order; for merged tokens the index whose
            position the merged token took; for methods that drop inside the language model those alive after its last layer.
        groups: int64 `[total]`, for each visual token the index of the token that its value entered the language model with (an
            index into the kept indices of the first stage), -1 where it was dropped.
        stages: the kept indices with the first layer of the language model that sees just these, ascending by layer; in the order
            in which the layer sees them, which is not always ascending where tokens are merged between layers.
        stage_groups: for every stage but the first its first layer and where each token of the stage before went: int64, the
            index of its token among those that the stage keeps, -1 where it was dropped.
        layout: geometry of all its visual tokens.
        modality: "image" or "video".
        tower_groups: int64 `[tiles, patches]`, for each patch of each tile that the vision tower encoded the number of the token
            that it went into there, -1 where it was dropped; None where no method reduced tokens in the tower.
        scores: fp32 `[total]`, what the method ranked the visual tokens by (a method in stages the first time), the best highest,
            NaN for tokens that it did not rank; None where no one number decides.
    """

    batch_index: int
    total: int
    kept: Tensor
    groups: Tensor
    layout: VisualLayout
    stages: tuple[tuple[int, Tensor], ...] = ()
    modality: str = "image"
    stage_groups: tuple[tuple[int, Tensor], ...] = ()
    tower_groups: Tensor | None = None
    scores: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """`(rows, columns)` where the tokens are one plain raster, else None."""
        return self.layout.grid

    @property
    def kept_by_frame(self) -> list[Tensor]:
        """Kept patches of every frame (an image is one), as indices that count from the first of that frame."""
        frames, patches = self.layout.frame, self.kept[~self.layout.newline[self.kept]]
        starts = [int((frames == frame).nonzero()[0]) for frame in frames.unique()]
        return [patches[frames[patches] == frame] - start for frame, start in enumerate(starts)]

    @property
    def kept_per_frame(self) -> list[int]:
        """Number of kept patches of every frame (an image is one); newlines are in no frame."""
        patches = self.kept[~self.layout.newline[self.kept]]
        return self.layout.frame[patches].bincount(minlength=self.layout.frames).tolist()


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The latest prefill of a model. Tensors stay where they are until `images` is read.

    Attributes:
        method: name of the method, or names joined by "+".
        signal: what the method scored by ("cls_attention layer 22", say), None where it used no attention.
        text_tokens: valid prompt tokens that are not visual, per row.
        visual_tokens_per_layer: visual tokens per row `[rows]` and language-model layer `[layers]`.
        groups_per_image: with methods that merge, per image where each visual token went; see `ImageRecord.groups`.
        tower_groups_per_image: with methods that reduce tokens in the vision tower; see `ImageRecord.tower_groups`.
        kept_by_stage: with methods that drop inside the language model, per stage its first layer and the kept indices per image.
        groups_by_stage: with methods that merge inside the language model, per cut its layer and per image where each token went,
            None where kept tokens have their own values.
        ranked_per_image: with methods that rank by a score, per image the indices ranked (None: all) and their scores.
        text: per row bool `[columns]` on the CPU, the valid tokens of the call that are not visual.
        image_columns: per image int64 `[total]` on the CPU, `row * columns + column` of its visual tokens in the call.
    """

    method: str
    signal: str | None
    text_tokens: list[int]
    visual_tokens_per_layer: list[list[int]]
    image_rows: Sequence[int]
    image_totals: Sequence[int]
    image_layouts: Sequence[VisualLayout]
    image_modalities: Sequence[str]
    kept_per_image: Sequence[Tensor | int]
    groups_per_image: Sequence[Tensor] = ()
    tower_groups_per_image: Sequence[Tensor] = ()
    kept_by_stage: Sequence[tuple[int, Sequence[Tensor | int]]] = ()
    groups_by_stage: Sequence[tuple[int, Sequence[Tensor | None]]] = ()
    ranked_per_image: Sequence[tuple[Tensor | None, Tensor] | None] = ()
    text: Sequence[Tensor] = ()
    image_columns: Sequence[Tensor] = ()

    def kept_columns(self, row: int, layer: int = 0) -> Tensor:
        """Return the columns of the call that a layer saw in a row, int64: text and the visual tokens alive there.

        They ascend, except where tokens merged between layers stand behind the others of their image.

        What `output_attentions=True` returns keeps the pruned lengths. Of its `[batch, heads, queries, keys]` for that layer
        the last `len(kept_columns)` queries and keys of the row are these columns, in this order; what precedes them is
        padding, or keys of earlier calls. Layers before which nothing was dropped have all
        columns of the call. Visual tokens are the `image.kept` among them (`image.stages` by layer).

        Args:
            row: row of the batch, after the expansion for beams and return sequences.
            layer: 0-based layer of the language model.

        Raises:
            IndexError: there is no such row or layer.
        """
        import torch

        if not 0 <= row < len(self.text) or not 0 <= layer < len(self.visual_tokens_per_layer[row]):
            raise IndexError(
                f"row {row}, layer {layer}; the record has {len(self.visual_tokens_per_layer)} rows and "
                f"{len(self.visual_tokens_per_layer[0])} layers."
            )
        columns = [self.text[row].nonzero().flatten()]
        places = list(columns)
        for image, mine in zip(self.images, self.image_columns, strict=True):
            if image.batch_index == row:
                alive = [kept for first, kept in image.stages if first <= layer][-1]
                columns.append(mine[alive] - row * len(self.text[row]))
                places.append(columns[-1].sort().values)
        return torch.cat(columns)[torch.cat(places).argsort()]

    @property
    def videos(self) -> list[ImageRecord]:
        """The videos among `images`."""
        return [image for image in self.images if image.modality == "video"]

    @cached_property
    def images(self) -> list[ImageRecord]:
        """One `ImageRecord` an image or video, in prompt order; reading it moves the kept indices to the CPU."""
        import torch

        def indices(kept: Tensor | int) -> Tensor:
            return torch.arange(kept) if isinstance(kept, int) else kept.to("cpu", torch.int64)

        records = []
        for image, (row, total, kept) in enumerate(
            zip(self.image_rows, self.image_totals, self.kept_per_image, strict=True)
        ):
            stages = tuple((layer, indices(per_image[image])) for layer, per_image in self.kept_by_stage)
            stages = stages or ((0, indices(kept)),)
            if self.groups_per_image:
                groups = indices(self.groups_per_image[image])
            else:
                entered = stages[0][1]
                groups = torch.full((total,), -1).index_copy_(0, entered, torch.arange(len(entered)))
            layout, modality = self.image_layouts[image], self.image_modalities[image]
            merged = [per_image[image] for _, per_image in self.groups_by_stage]
            between = _stage_groups(total, stages, merged)
            tower = indices(self.tower_groups_per_image[image]) if self.tower_groups_per_image else None
            ranked = self.ranked_per_image[image] if self.ranked_per_image else None
            scores = None if ranked is None else _spread(total, *ranked)
            last = indices(kept)
            records.append(ImageRecord(row, total, last, groups, layout, stages, modality, between, tower, scores))
        return records

    def __repr__(self) -> str:
        kept = [k if isinstance(k, int) else k.numel() for k in self.kept_per_image]
        return f"RunRecord(method={self.method!r}, visual tokens per image={list(self.image_totals)} -> {kept})"

    def __str__(self) -> str:
        scored = f", scored by {self.signal}" if self.signal else ""
        lines = [f"{self.method}{scored}"]
        for image in self.images:
            share = f"{100 * len(image.kept) / image.total:.0f} %" if image.total else "-"
            stages = [f"{len(kept)} from layer {layer}" for layer, kept in image.stages[1:]]
            entered = f"{len(image.stages[0][1])} at the entry, " if stages else ""
            what = ", ".join(stages) if stages else str(len(image.kept))
            lines.append(f"row {image.batch_index}, {image.modality}: {image.total} -> {entered}{what} ({share})")
        return "\n".join(lines if self.images else [*lines, "no images"])


def _spread(total: int, index: Tensor | None, scores: Tensor) -> Tensor:
    import torch

    known = scores.detach().to("cpu", torch.float32)
    return known if index is None else torch.full((total,), torch.nan).index_copy_(0, index.cpu(), known)


def _stage_groups(
    total: int, stages: Sequence[tuple[int, Tensor]], merged: Sequence[Tensor | None]
) -> tuple[tuple[int, Tensor], ...]:
    """Return where the tokens of each stage went in the next, from what is kept where nothing is merged."""
    import torch

    found = []
    for number, ((_, before), (layer, after)) in enumerate(pairwise(stages)):
        groups = merged[number] if number < len(merged) else None
        if groups is None:
            place = torch.full((total,), -1).index_copy_(0, after, torch.arange(len(after)))
            groups = place[before]
        found.append((layer, groups.to("cpu", torch.int64)))
    return tuple(found)
