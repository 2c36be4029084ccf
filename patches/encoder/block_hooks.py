"""What the hooks on a tower's blocks do alike in every kind of tower."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.encoder_method import EncoderMethod

from ..call_options import OptionsInForce
from ..calls import CallStack, TowerCall
from ..families.family import Family
from ..hooks import HookSet


class BlockReduction(Protocol):
    """What is known of one run of the tower, in every kind of it.

    Attributes:
        method: what reduces.
        shorter: the residual stream behind the reduction between a block's attention and its MLP.
        mlp: what that block's MLP made of it.
    """

    method: EncoderMethod
    shorter: Tensor | None
    mlp: Tensor | None

    def removes(self, block: int) -> bool:
        """Whether a block removes something."""

    def reduce(self, block: int, hidden: Tensor, attention: Any) -> Tensor:
        """Return the hidden states as the method reduces them at a block."""


class BlockHooks:
    """A site in a tower, reducing in blocks that compute `h = x + attention(norm1(x))`, then `h + mlp(norm2(h))`.

    Attributes:
        family: the model's adapter.
        method: what reduces.
        patches: patches of a picture by which budgets are checked before one is seen.
    """

    patches: int

    def __init__(self, family: Family, method: EncoderMethod, calls: CallStack, options: OptionsInForce) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.options = options

    def install_behind(self, hooks: HookSet) -> None:
        """Register what must run behind the hooks of those who read the tower's output: nothing."""

    def check_given(self, method: EncoderMethod) -> None:
        """Raise UnsupportedCallError where a method would reduce something, for a call whose visual tokens were made by hand."""
        if method.plan(self.patches, self.family.tower_facts)[-1] < self.patches:
            raise UnsupportedCallError(
                f"{method.name!r} reduces tokens in the vision tower, and the visual tokens of this call were given as "
                "embeddings. Pass the pixels, or apply a method that acts at the input or between layers."
            )

    def method_in_force(self) -> EncoderMethod:
        """Return the method as this call's options have it."""
        pipelines = self.options.current.pipelines
        method = self.method if pipelines is None else pipelines.pipelines[0].at_encoder
        assert method is not None
        return method

    def _running(self) -> Any:
        call: TowerCall | None = self.calls.tower[-1] if self.calls.tower else None
        return None if call is None else call.reduction

    def _check_not_checkpointed(self, run: BlockReduction, module: nn.Module) -> None:
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise UnsupportedCallError(
                f"{run.method.name!r} cannot be combined with gradient checkpointing in the vision tower; allowed: training "
                "without it, or the tower in eval mode."
            )

    def _between(self, block: int, attention: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        run: BlockReduction | None = self._running()
        if run is None or run.method.place != "after attention" or not run.removes(block):
            return None
        run.shorter = run.reduce(block, args[0], attention)
        return (run.shorter, *args[1:]), kwargs

    def _keep_mlp(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        run: BlockReduction | None = self._running()
        if run is None or run.shorter is None:
            return None
        run.mlp = output
        # What the host adds to its residual stream, which is longer.
        return output.new_zeros(())

    def _reduced_output(self, run: BlockReduction, block: int, attention: nn.Module, output: Tensor) -> Tensor:
        """Return what a block gives after reducing in it or behind it."""
        if run.shorter is not None and run.mlp is not None:
            output, run.shorter, run.mlp = run.shorter + run.mlp, None, None
        if run.method.place == "after block" and run.removes(block):
            output = run.reduce(block, output, attention)
        return output
