"""All cosines of a segment, half of them mirrored."""

import pytest
import torch

from vlmprune.kernels.shared.cosine_matrix import MIRROR_ROWS, all_cosines, unit_rows


@pytest.mark.parametrize("tokens", [0, 1, 2 * MIRROR_ROWS - 1, 2 * MIRROR_ROWS, 3 * MIRROR_ROWS + 1])
def test_equals_the_whole_product(tokens):
    rows, _ = unit_rows(torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0)))
    cosines = all_cosines(rows)
    torch.testing.assert_close(cosines, rows @ rows.T)
    assert torch.equal(cosines, cosines.T) or tokens < 2 * MIRROR_ROWS
