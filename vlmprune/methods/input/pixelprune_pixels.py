"""PixelPrune's view of a Qwen processor's patches: one row of pixels a visual token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_frame(
    pixel_values: Tensor,
    frames: int = 2,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Tensor:
    """Return the patches' first frame with its normalisation undone, fp32 `[patches, 3 * patch * patch]`.

    Args:
        pixel_values: `[patches, 3 * frames * patch * patch]`, colour before frame.
        frames: frames a patch.
        mean: by colour, what the processor took off.
        std: by colour, what it divided by.
    """
    planes = pixel_values.float().unflatten(1, (len(mean), frames, -1))[:, :, 0]
    scale, shift = (torch.tensor(values, device=planes.device)[None, :, None] for values in (std, mean))
    return (planes * scale + shift).flatten(1)


def token_pixels(patches: Tensor, patches_a_token: int) -> Tensor:
    """Return the pixels of the neighbouring patches that become one visual token, `[tokens, dim]`."""
    return patches.reshape(patches.shape[0] // patches_a_token, -1)
