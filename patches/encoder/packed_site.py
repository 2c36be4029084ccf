"""Reducing tokens in the blocks of a tower over packed pictures (Qwen2-VL and later)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmprune.methods.encoder_method import EncoderMethod

from ..call_options import OptionsInForce
from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from .block_hooks import BlockHooks
from .packed_run import PackedReduction

# Visual tokens of a picture of 1000 x 1000 pixels or so: budgets that it cannot reach are refused at once.
LARGE_PICTURE = 1296


class PackedEncoderSite(BlockHooks):
    """The hooks on the blocks, which are those of a dense tower's, but for sequence bounds and rotary tables.

    All patches of a visual token go the same way. The tower attends inside frames, or inside windows of them, by bounds that are
    made anew for the tokens that are left.

    Attributes:
        method: what reduces.
    """

    patches = LARGE_PICTURE

    def __init__(self, family: Family, method: EncoderMethod, calls: CallStack, options: OptionsInForce) -> None:
        super().__init__(family, method, calls, options)
        self.check(method)

    def check(self, method: EncoderMethod) -> None:
        """Check that the method can run in this tower.

        Raises:
            BudgetError: its budget cannot be reached even for a large picture.
            ParameterError: its parameters do not fit.
        """
        method.plan(self.patches, self.family.tower_facts)

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

    @property
    def _reduction(self) -> PackedReduction | None:
        reduction: PackedReduction | None = self._running()
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
        self._check_not_checkpointed(run, module)
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
        call.reduction = PackedReduction.begin(
            self.method_in_force(),
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
        hidden = self._reduced_output(run, block, attention, output)
        run.projected = None
        if restored and run.changed:
            run.goes_on = hidden
            hidden = run.restored(hidden)
        return hidden
