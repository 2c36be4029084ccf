"""Masks that the multimodal module makes itself, per kind of layer or one for all, where images see themselves both ways."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask

from vlmprune.errors import UnsupportedCallError

from ..calls import LanguageModelCall
from .compaction import Compaction

_BY_LAYER_TYPE: dict[str, Any] = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING


@dataclass(eq=False)
class HostMasks:
    """What the host made of the caller's 2-D mask before it called the language model.

    It is made anew for a shorter sequence, by the host's own functions: gathering its rows and columns would count dropped tokens
    into sliding windows. Which tokens see each other both ways is read of the mask. Whether that explains it is found out by
    making the given mask from the given sequence; where the two differ the call is refused.

    Attributes:
        given: the mask, `[batch, 1, queries, keys]`, or a mapping of such from kinds of layers.
        language_model: the decoder.
        multimodal_model: the module around it.
    """

    given: Any
    language_model: nn.Module
    multimodal_model: nn.Module

    def arguments(self, call: LanguageModelCall, arguments: dict[str, Any], blocks: Tensor | None) -> dict[str, Any]:
        """Return the language model's arguments with the masks for their sequence.

        Args:
            call: the call in the caller's columns.
            arguments: the arguments, with a 2-D mask or none.
            blocks: int64 `[batch, columns]`, the block of tokens that see each other both ways, -1 for none, as the family
                knows it; None if it is to be read of the mask.

        Raises:
            UnsupportedCallError: the masks cannot be explained.
        """
        if call.entry is None and call.state is None:
            return {**arguments, "attention_mask": self.given}
        if call.state is None:
            blocks = self._blocks(call.past) if blocks is None else blocks
            make = self._maker(call, blocks)
        elif blocks is not None or not self._sees_ahead():
            make = next(self._makers(blocks is not None))
        else:
            self._refuse("behind a pruned cache it lets tokens see later ones")
        if blocks is not None and call.entry is not None:
            blocks = _gathered(blocks, call.entry)
        tokens = arguments["inputs_embeds"]
        mask = make(tokens, arguments["attention_mask"], call.cache, _behind(call.past, blocks))
        return {**arguments, "attention_mask": mask}

    def _maker(self, call: LanguageModelCall, blocks: Tensor | None) -> Callable[..., Any]:
        """Return the function that makes the given masks from the given sequence."""
        for make in self._makers(blocks is not None):
            try:
                made = make(call.tokens, call.mask, call.cache, _behind(call.past, blocks))
            except (TypeError, ValueError, KeyError):
                continue
            if _same(made, self.given, call.valid.to(call.device)):
                return make
        self._refuse("it is no causal mask, with or without blocks and windows, of the given sequence")

    def _makers(self, blocked: bool) -> Iterator[Callable[..., Any]]:
        config = self.language_model.config
        kinds = list(self.given) if isinstance(self.given, dict) else None

        def plain(tokens: Tensor, mask: Tensor | None, cache: Any, blocks: Tensor | None) -> Any:
            given = {"config": config, "inputs_embeds": tokens, "attention_mask": mask, "past_key_values": cache}
            if blocks is not None:
                given["block_sequence_ids"] = blocks
            given["position_ids"] = None
            if kinds is None:
                return create_causal_mask(**given)
            return {kind: _BY_LAYER_TYPE[kind](**given) for kind in kinds}

        own = self._own_function() if blocked and kinds is not None else None
        if own is not None:
            yield lambda tokens, mask, cache, blocks: own(
                config=config,
                inputs_embeds=tokens,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=None,
                block_sequence_ids=blocks,
            )
        yield plain

    def _own_function(self) -> Callable[..., Any] | None:
        for cls in type(self.multimodal_model).__mro__:
            function = getattr(sys.modules.get(cls.__module__), "create_masks_for_vision_model", None)
            if function is not None:
                return function
        return None

    def _blocks(self, past: int) -> Tensor | None:
        """Return the unbroken runs of tokens that see the next one, int64 `[batch, queries]`, -1 elsewhere; None without any."""
        seen = [ahead for ahead in (_seen_ahead(mask, past) for mask in self._masks()) if ahead is not None]
        if not seen or not bool(torch.stack(seen).any()):
            return None
        ahead = torch.stack(seen).any(0)
        before = torch.cat([torch.zeros_like(ahead[:, :1]), ahead], 1)
        inside = torch.cat([ahead, torch.zeros_like(ahead[:, :1])], 1) | before
        return torch.where(inside, (inside & ~before).cumsum(1) - 1, -1)

    def _sees_ahead(self) -> bool:
        for mask in self._masks():
            if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] > 1:
                ahead = _seen_ahead(mask, mask.shape[3] - mask.shape[2])
                if ahead is not None and bool(ahead.any()):
                    return True
        return False

    def _masks(self) -> list[Any]:
        return list(self.given.values()) if isinstance(self.given, dict) else [self.given]

    def _refuse(self, why: str) -> NoReturn:
        name = type(self.multimodal_model).__name__
        raise UnsupportedCallError(
            f"{name} made the attention_mask of this call itself, and vlmprune cannot make it for fewer tokens: {why}. "
            "Allowed: masks that transformers' sdpa, eager or flash attention take."
        )


def read_host_masks(
    call: LanguageModelCall, multimodal_model: nn.Module, language_model: nn.Module
) -> HostMasks | None:
    """Return what the host made of the caller's mask; None where it passes that on, or the caller made it.

    The call's own arguments get the caller's mask back.
    """
    mask, caller = call.mask, call.model_call.inputs.get("attention_mask")
    if call.model_call.direct or mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return None
    if caller is not None and not (isinstance(caller, Tensor) and caller.ndim == 2):
        return None
    call.arguments = {**call.arguments, "attention_mask": caller}
    return HostMasks(mask, language_model, multimodal_model)


def _seen_ahead(mask: Any, past: int) -> Tensor | None:
    """Return where a token sees the next one, bool `[batch, queries - 1]`; None of what is no 4-D mask."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] < 2:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    query = torch.arange(mask.shape[2] - 1, device=mask.device)
    # A sliding window's keys may begin later than those of full attention; the last ones are this call's.
    first = min(past, mask.shape[3] - mask.shape[2])
    return seen[:, 0, query, first + query + 1]


def _same(made: Any, given: Any, valid: Tensor) -> bool:
    """Return whether two masks are the same to the tokens that are `valid [batch, queries]`; what padding sees is nobody's."""
    if isinstance(given, dict):
        return (
            isinstance(made, dict)
            and made.keys() == given.keys()
            and all(_same(made[kind], given[kind], valid) for kind in given)
        )
    if isinstance(given, Tensor):
        if not isinstance(made, Tensor) or made.shape != given.shape:
            return False
        return torch.equal(made[:, 0][valid], given[:, 0][valid]) if given.ndim == 4 else torch.equal(made, given)
    return made is None and given is None


def _behind(past: int, blocks: Tensor | None) -> Tensor | None:
    """Return the blocks with those of `past` cached tokens before them, which are in none: hosts count from the first."""
    return None if blocks is None else torch.nn.functional.pad(blocks, (past, 0), value=-1)


def _gathered(blocks: Tensor, compaction: Compaction) -> Tensor:
    index = compaction.index.to(blocks.device)
    return blocks.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
