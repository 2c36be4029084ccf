"""Reducing tokens in the blocks of a tower over packed pictures (Qwen2-VL and later)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.encoder_method import EncoderMethod

from ..call_options import OptionsInForce
from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from .packed_run import PackedReduction

# Visual tokens of a picture of 1000 x 1000 pixels or so: budgets that it cannot reach are refused at once.
LARGE_PICTURE = 1296


class PackedEncoderSite:
    """The hooks on the blocks, which are those of a dense tower's, but for sequence bounds and rotary tables.

    All patches of a visual token go the same way. The tower attends inside frames, or inside windows of them, by bounds that are
    made anew for the tokens that are left.

    Attributes:
        method: what reduces.
    """

    def __init__(self, family: Family, method: EncoderMethod, calls: CallStack, options: OptionsInForce) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.options = options
        self.check(method)

    def check(self, method: EncoderMethod) -> None:
        """Check that the method can run in this tower.

        Raises:
            BudgetError: its budget cannot be reached even for a large picture.
            ParameterError: its parameters do not fit.
        """
        method.plan(LARGE_PICTURE, self.family.tower_facts)

    def install(self, hooks: HookSet, read: Sequence[int] = ()) -> None:
        """Register the hooks.

        Args:
            hooks: where.
            read: blocks whose outputs somebody else reads.
        """
        tower: Any = self.family.vision_tower
        deep = getattr(tower, "deepstack_visual_indexes", None) or ()
        restored = {*deep, *read, len(tower.blocks) - 1}
        hooks.before("vision grids", tower, self._keep_grids)
        for block, layer in enumerate(tower.blocks):
            name, attention = f"vision block {block}", hooks.child(layer, "attn")
            hooks.before(f"{name} entry", layer, partial(self._enter, block))
            hooks.after(f"{name} qkv", hooks.child(attention, "qkv"), partial(self._project, attention))
            hooks.before(f"{name} attention exit", hooks.child(attention, "proj"), partial(self._narrow, attention))
            hooks.before(f"{name} between", hooks.child(layer, "norm2"), partial(self._between, block, attention))
            hooks.after(f"{name} mlp", hooks.child(layer, "mlp"), self._keep_mlp)
            leave = partial(self._leave, block, attention, block in restored)
            hooks.after(f"{name} exit", layer, leave, first=True)

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Take any arguments of an encoder call."""

    def check_given(self, method: EncoderMethod) -> None:
        """Raise UnsupportedCallError where a method would reduce something, for a call whose visual tokens were made by hand."""
        if method.plan(LARGE_PICTURE, self.family.tower_facts)[-1] < LARGE_PICTURE:
            raise UnsupportedCallError(
                f"{method.name!r} reduces tokens in the vision tower, and the visual tokens of this call were given as "
                "embeddings. Pass the pixels, or apply a method that acts at the input or between layers."
            )

    @property
    def _reduction(self) -> PackedReduction | None:
        reduction: Any = self.calls.tower[-1].reduction if self.calls.tower else None
        return reduction

    def _keep_grids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.calls.tower:
            return
        call = self.calls.tower[-1]
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        merge = int(module.spatial_merge_size)
        call.captured["grids", 0] = [
            (rows // merge, columns // merge) for frames, rows, columns in grid.tolist() for _ in range(frames)
        ]
        if getattr(module, "fullatt_block_indexes", None) is not None:
            # Callers may bring both along; the host then takes theirs.
            order = kwargs.get("window_index") if kwargs.get("cu_window_seqlens") is not None else None
            if order is None:
                order, _ = get_vision_window_index(grid, merge, module.window_size, module.patch_size)
            call.captured["order of windows", 0] = order

    def _enter(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.calls.tower:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if block == 0:
            self._begin(hidden)
        run = self._reduction
        if run is None:
            return None
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise UnsupportedCallError(
                f"{run.method.name!r} cannot be combined with gradient checkpointing in the vision tower; allowed: training "
                "without it, or the tower in eval mode."
            )
        run.given = {name: kwargs.get(name) for name in ("cu_seqlens", "position_embeddings", "max_seqlen")}
        if run.goes_on is not None:
            hidden, run.goes_on = run.goes_on, None
        if run.method.place == "before attention" and run.removes(block):
            hidden = run.reduce(block, hidden, module.attn)
        if not run.changed:
            return None
        cos, sin = kwargs["position_embeddings"]
        changes = {
            "cu_seqlens": run.bounds(kwargs["cu_seqlens"]),
            "position_embeddings": (run.rotary(cos, 1.0), run.rotary(sin, 0.0)),
        }
        if args:
            return (hidden, *args[1:]), {**kwargs, **changes}
        return args, {**kwargs, **changes, "hidden_states": hidden}

    def _begin(self, hidden: Tensor) -> None:
        call = self.calls.tower[-1]
        pipelines = self.options.current.pipelines
        method = self.method if pipelines is None else pipelines.pipelines[0].at_encoder
        assert method is not None
        call.reduction = PackedReduction.begin(
            method,
            self.family.tower_facts,
            call.captured["grids", 0],
            call.captured.get(("order of windows", 0)),
            hidden,
        )

    def _project(
        self, attention: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        run = self._reduction
        if run is None:
            return None
        run.projected = output
        return run.with_bias(output, attention)

    def _narrow(self, attention: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._reduction
        return None if run is None else ((run.attended(args[0], attention), *args[1:]), kwargs)

    def _between(self, block: int, attention: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        run = self._reduction
        if run is None or run.method.place != "after attention" or not run.removes(block):
            return None
        run.shorter = run.reduce(block, args[0], attention)
        return (run.shorter, *args[1:]), kwargs

    def _keep_mlp(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        run = self._reduction
        if run is None or run.shorter is None:
            return None
        run.mlp = output
        # What the host adds to its residual stream, which is longer.
        return output.new_zeros(())

    def _leave(
        self,
        block: int,
        attention: nn.Module,
        restored: bool,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Tensor,
    ) -> Tensor | None:
        run = self._reduction
        if run is None:
            return None
        hidden = output
        if run.shorter is not None and run.mlp is not None:
            hidden, run.shorter, run.mlp = run.shorter + run.mlp, None, None
        if run.method.place == "after block" and run.removes(block):
            hidden = run.reduce(block, hidden, attention)
        run.projected = None
        if restored and run.changed:
            run.goes_on = hidden
            hidden = run.restored(hidden)
        return hidden
