"""Reducing tokens in the blocks of a vision tower, without changing what the host's code sees of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods.encoder_method import EncoderMethod

from ..call_options import OptionsInForce
from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from .block_hooks import BlockHooks
from .merged_features import MergedFeatures
from .run import TowerReduction

BIASED_BACKENDS = ("eager", "sdpa")
"""Attention backends that take a number to add to the logits."""
PROJECTIONS = ("keys", "queries", "values")


class EncoderSite(BlockHooks):
    """The hooks on the blocks of a dense tower (CLIP, SigLIP).

    Between attention and MLP the hook in front of `layer_norm2` keeps the reduced residual stream and hands it to the norm, the
    one behind `mlp` keeps what comes out and gives the host 0 to add, and the one behind the block returns their sum. Outputs
    that somebody reads are restored to all tokens; the next block goes on with the reduced ones.

    Attributes:
        method: what reduces.
        blocks: blocks of the tower that precede its features, which alone reduce.
        tower: facts of the tower.
    """

    def __init__(self, family: Family, method: EncoderMethod, calls: CallStack, options: OptionsInForce) -> None:
        super().__init__(family, method, calls, options)
        self.states = family.state_layers
        if min(self.states) < 0:
            raise UnsupportedMethodError(
                f"{method.name!r} reduces tokens in the blocks of the vision tower, but the visual tokens of this model are made "
                "from the tower's embeddings; allowed: a vision_feature_layer behind a block."
            )
        self.blocks = max(self.states) + 1
        self.tower = family.tower_facts
        self.leading = int(self.tower.has_cls)
        vision = family.config.vision_config
        self.patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
        self.check(method)

    def check(self, method: EncoderMethod) -> None:
        """Check that the method can run in this tower.

        Raises:
            BudgetError: its budget cannot be reached.
            ParameterError: its parameters do not fit.
            UnsupportedMethodError: its attention needs a bias, which the tower's attention backend does not take.
        """
        method.plan(self.patches, self.tower)
        backend = self._backend()
        if method.proportional and backend not in BIASED_BACKENDS:
            raise UnsupportedMethodError(_no_bias(method, backend))

    def install(self, hooks: HookSet, read: Sequence[int] = ()) -> None:
        """Register the hooks.

        Args:
            hooks: where.
            read: blocks whose outputs somebody else reads, beside the ones that make the features.
        """
        layers: Any = self.family.vision_layers  # type: ignore[attr-defined]
        restored = {*self.states, *read, len(layers) - 1}
        for block, layer in enumerate(layers):
            name = f"vision block {block}"
            hooks.before(f"{name} entry", layer, partial(self._enter, block))
            attention = hooks.child(layer, "self_attn")
            if block < self.blocks:
                for kind in PROJECTIONS:
                    projection = hooks.child(attention, f"{kind[0]}_proj")
                    hooks.after(f"{name} {kind}", projection, partial(self._keep_projection, kind))
                exit_hook = partial(self._replace_attention, attention)
                hooks.before(f"{name} attention exit", hooks.child(attention, "out_proj"), exit_hook)
                hooks.before(
                    f"{name} between", hooks.child(layer, "layer_norm2"), partial(self._between, block, attention)
                )
                hooks.after(f"{name} mlp", hooks.child(layer, "mlp"), self._keep_mlp)
            # Ahead of the host's own hooks, which collect hidden states.
            leave = partial(self._leave, block, attention, block in restored)
            hooks.after(f"{name} exit", layer, leave, first=True)

    def install_behind(self, hooks: HookSet) -> None:
        """Register what hands merged tokens to the projector, behind the hooks of those who read all patches of its input."""
        if self.method.output == "merged":
            MergedFeatures(self.family, self.calls).install(hooks)

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise UnsupportedCallError for arguments of an encoder call that take features from other blocks than configured."""
        changed = self.family.changed_features(inputs)
        if changed is not None:
            raise UnsupportedCallError(
                f"{changed} was given for this call, and {self.method.name!r} reduces tokens up to the configured block. Set it "
                "in model.config before vlmprune.apply."
            )

    @property
    def _reduction(self) -> TowerReduction | None:
        reduction: TowerReduction | None = self._running()
        return reduction

    def _enter(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.calls.tower:
            return None
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs["hidden_states"] if named else args[0]
        if block == 0:
            hidden = self._begin(hidden)
        run = self._reduction
        if run is None:
            return None
        self._check_not_checkpointed(run, module)
        if run.goes_on is not None:
            hidden, run.goes_on = run.goes_on, None
        run.captured.clear()
        if run.method.place == "before attention" and run.removes(block):
            run.project(hidden, module)
            hidden = run.reduce(block, hidden, module.self_attn)
            run.captured.clear()
        bias = run.bias
        if bias is not None:
            if self._backend() not in BIASED_BACKENDS:
                raise UnsupportedCallError(
                    _no_bias(run.method, self._backend())
                    if run.method.proportional
                    else _no_mask(run.method, self._backend())
                )
            given = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            if given is not None:
                raise UnsupportedCallError(
                    f"{run.method.name!r} adds to the logits of the vision tower's attention, and this call has a mask there."
                )
            mask = bias[:, None, None].to(hidden.dtype)
            if len(args) > 1:
                args = (args[0], mask, *args[2:])
            else:
                kwargs = {**kwargs, "attention_mask": mask}
        if named:
            return args, {**kwargs, "hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    def _begin(self, hidden: Tensor) -> Tensor:
        call = self.calls.tower[-1]
        call.reduction = None
        method = self.method_in_force()
        patches = hidden.shape[1] - self.leading
        plan = method.plan(patches, self.tower)
        if plan[-1] == patches:
            return hidden
        appended = method.append(hidden, self.tower)
        if appended is not None:
            hidden = torch.cat([hidden, appended], 1)
        trailing = 0 if appended is None else appended.shape[1]
        if trailing != method.trailing(self.tower):
            raise RuntimeError(
                f"{method.name!r} appended {trailing} tokens and says that it appends {method.trailing(self.tower)}."
            )
        call.reduction = TowerReduction(method, plan, patches, self.tower, hidden, trailing)
        return hidden

    def _keep_projection(self, kind: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        run = self._reduction
        if run is not None and (kind in run.method.reads or (kind == "values" and run.attention is not None)):
            run.captured[kind] = output

    def _replace_attention(
        self, attention: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        run = self._reduction
        if run is None or run.attention is None:
            return None
        values = run.captured.pop("values").unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        attended = (run.attention.to(values.dtype) @ values).transpose(1, 2).flatten(2)
        run.attention = None
        return (attended, *args[1:]), kwargs

    def _leave(
        self, block: int, attention: nn.Module, restored: bool, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        run = self._reduction
        if run is None:
            return None
        hidden = self._reduced_output(run, block, attention, output[0] if isinstance(output, tuple) else output)
        if run.plan[-1] == run.patches and run.counts is None:
            # The tokens decided that none goes.
            self.calls.tower[-1].reduction = None
            return None
        if restored and (run.tokens.changed or run.trailing):
            run.goes_on = hidden
            if block in self.states:
                run.read[block] = hidden
            hidden = run.tokens.restored(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _backend(self) -> str:
        attention: Any = self.family.vision_attention(0)
        backend = getattr(attention.config, "_attn_implementation", None)
        return backend or "eager"


def _no_bias(method: EncoderMethod, backend: str) -> str:
    return (
        f"{method.name!r} adds the logarithm of the tokens' sizes to the logits of the vision tower's attention, which its "
        f"backend {backend!r} does not take; allowed: {', '.join(map(repr, BIASED_BACKENDS))} for the vision tower, or a method "
        "without sizes (proportional_attention=False where it has that parameter)."
    )


def _no_mask(method: EncoderMethod, backend: str) -> str:
    return (
        f"{method.name!r} leaves different numbers of tokens in the tiles of this call, and the vision tower's attention backend "
        f"{backend!r} takes no mask that hides the padding; allowed: {', '.join(map(repr, BIASED_BACKENDS))} for the vision "
        "tower, one image a call, or a given keep."
    )
