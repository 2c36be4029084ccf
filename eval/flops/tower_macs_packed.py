"""Cost of the towers of Qwen's vision-language models, which take pictures of any size in one packed sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder_method import EncoderMethod, block_tokens
from vlmprune.patches.encoder.packed_run import EXTRA
from vlmprune.patches.families.facts import packed_tower_facts, tower_width

from .vision_work import VisionWork


@dataclass(frozen=True)
class PackedTower:
    """Sizes of a tower. `window` is the side of a window in patches; layers in `whole` attend to the whole frame."""

    layers: int
    hidden: int
    ffn_weights: int
    patch_values: int
    merge: int
    out: int
    mergers: int
    window: int | None
    whole: frozenset[int]

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> PackedTower:
        """Read the sizes of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (deepstack mergers included)."""
        vision = config.vision_config
        second = hasattr(vision, "embed_dim") and hasattr(vision, "mlp_ratio")
        hidden = tower_width(config)
        ffn = int(hidden * vision.mlp_ratio) if second else vision.intermediate_size
        windowed = getattr(vision, "fullatt_block_indexes", None) is not None
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        return cls(
            layers=vision.depth,
            hidden=hidden,
            ffn_weights=(3 if windowed else 2) * hidden * ffn,
            patch_values=channels * vision.temporal_patch_size * vision.patch_size**2,
            merge=vision.spatial_merge_size,
            out=vision.hidden_size if second else vision.out_hidden_size,
            mergers=1 + len(getattr(vision, "deepstack_visual_indexes", None) or ()),
            window=vision.window_size // vision.patch_size if windowed else None,
            whole=frozenset(vision.fullatt_block_indexes if windowed else range(vision.depth)),
        )

    def segments(self, work: VisionWork, layer: int) -> Iterator[int]:
        """Lengths of the runs of patches that attend to each other in `layer`: frames, or windows of them."""
        for frames, rows, columns in work.grids:
            if self.window is None or layer in self.whole:
                yield from frames * [rows * columns]
                continue
            side = self.window - self.window % self.merge
            for height in _steps(rows, side):
                for width in _steps(columns, side):
                    yield from frames * [height * width]

    def macs(
        self, work: VisionWork, method: EncoderMethod | None = None, facts: TowerFacts | None = None
    ) -> tuple[int, int]:
        """MACs of the tower, and of all its mergers.

        Windows lose tokens as the picture has it; here each loses the same share. Attention with a bias is wider. Patches are
        embedded all, before any is dropped.

        Args:
            work: what the tower is given.
            method: what reduces tokens in its blocks, if anything.
            facts: facts of the tower, beside a method.
        """
        patches = sum(frames * rows * columns for frames, rows, columns in work.grids)
        tower = patches * self.patch_values * self.hidden
        tokens = [frames * rows * columns // self.merge**2 for frames, rows, columns in work.grids]
        chosen = work.kept or tokens
        for grid, total, kept in zip(work.grids, tokens, chosen, strict=True):
            frames, rows, columns = grid
            whole = rows * columns
            for layer, counts in enumerate(self._left((rows, columns), method, facts)):
                attended, wide = (count * kept // total for count in counts)
                tower += frames * (attended * 4 * self.hidden**2 + wide * self.ffn_weights)
                runs = self.segments(VisionWork(grids=(grid,)), layer)
                width = self.hidden
                if method is not None and facts is not None and method.proportional and attended < whole:
                    width += facts.heads * 2 * EXTRA
                tower += sum(2 * (length * attended // whole) ** 2 * width for length in runs)
        return tower, self.mergers * sum(chosen) * self.merger_macs

    def _left(
        self, grid: tuple[int, int], method: EncoderMethod | None, facts: TowerFacts | None
    ) -> list[tuple[int, int]]:
        """Patches of a frame of that many rows and columns that go through attention and through the MLP of each block."""
        patches = grid[0] * grid[1]
        if method is None or facts is None:
            return self.layers * [(patches, patches)]
        merged = self.merge**2
        counts = block_tokens(method, patches // merged, facts, (grid[0] // self.merge, grid[1] // self.merge))
        return [(attended * merged, wide * merged) for attended, wide in counts]

    @property
    def merger_macs(self) -> int:
        """MACs of one merger for one visual token."""
        width = self.hidden * self.merge**2
        return width * (width + self.out)


def _steps(size: int, step: int) -> list[int]:
    return [min(step, size - start) for start in range(0, size, step)]


def packed_tower_macs(
    config: PreTrainedConfig, work: VisionWork, method: EncoderMethod | None = None
) -> tuple[int, int]:
    """MACs of a Qwen tower and its mergers for the pictures and videos of `work.grids`; `method` reduces tokens in its blocks."""
    return PackedTower.from_config(config).macs(work, method, packed_tower_facts(config))


def packed_projector_macs(config: PreTrainedConfig) -> int:
    """MACs of the merger for one visual token."""
    return PackedTower.from_config(config).merger_macs


def packed_projector_hidden(config: PreTrainedConfig) -> int:
    """Width between the layers of the merger."""
    tower = PackedTower.from_config(config)
    return tower.hidden * tower.merge**2


def packed_segments(config: PreTrainedConfig, work: VisionWork, layer: int) -> list[int]:
    """Runs of patches that attend to each other."""
    return list(PackedTower.from_config(config).segments(work, layer))


def packed_tiles(config: PreTrainedConfig, work: VisionWork) -> list[tuple[int, tuple[int, int]]]:
    """The frames of each picture or video, and rows and columns of visual tokens of one."""
    merge = PackedTower.from_config(config).merge
    return [(frames, (rows // merge, columns // merge)) for frames, rows, columns in work.grids]


def packed_unit(config: PreTrainedConfig) -> int:
    """Patches of a visual token."""
    return PackedTower.from_config(config).merge ** 2
