"""Lengths and angles of what enters and leaves a module."""

import pytest
import torch

from vlmprune.kernels import token_transition as module
from vlmprune.kernels.token_transition import token_transition

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (5, 30), (37, 1100)])
def test_values(tokens: int, dim: int, dtype: torch.dtype, implementation: str, device: str) -> None:
    entering = torch.randn(tokens, 2 * dim).to(dtype)[:, ::2]
    leaving = (0.5 * entering + torch.randn(tokens, dim) * 2).to(dtype)
    found = token_transition(entering.to(device), leaving.to(device), implementation=implementation)
    before, after = entering.double(), leaving.double()
    expected = (after.norm(dim=1) / before.norm(dim=1), torch.cosine_similarity(before, after))
    for values, wanted in zip(found, expected, strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.cpu().double(), wanted, atol=1e-6, rtol=1e-5)


@BOTH
def test_zeros_and_small_numbers(implementation: str, device: str) -> None:
    entering, leaving = torch.randn(4, 20), torch.randn(4, 20)
    entering[0], leaving[1] = 0, 0
    entering[3], leaving[3] = entering[2] * 1e-17, leaving[2] * 1e-17
    ratio, cosine = token_transition(entering.to(device), leaving.to(device), implementation=implementation)
    assert ratio[:2].tolist() == [0, 0]
    assert cosine[:2].tolist() == [0, 0]
    torch.testing.assert_close(ratio[2], ratio[3])
    torch.testing.assert_close(cosine[2], cosine[3])


@BOTH
@pytest.mark.parametrize(("tokens", "dim"), [(0, 4), (3, 0)])
def test_empty(tokens: int, dim: int, implementation: str, device: str) -> None:
    empty = torch.zeros(tokens, dim, device=device)
    for values in token_transition(empty, empty, implementation=implementation):
        assert values.tolist() == [0.0] * tokens


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    entering, leaving = torch.randn(47, 8), torch.randn(47, 8)
    whole = token_transition(entering, leaving)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 80)
    torch.testing.assert_close(token_transition(entering, leaving), whole)


@pytest.mark.parametrize(("entering", "leaving"), [((4, 8), (4, 9)), ((1, 4, 8), (1, 4, 8))])
def test_bad_shapes(entering: tuple[int, ...], leaving: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        token_transition(torch.zeros(entering), torch.zeros(leaving))
