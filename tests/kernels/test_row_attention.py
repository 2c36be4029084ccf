"""Attention of chosen query rows."""

import pytest
import torch
from torch import Tensor

from vlmprune.kernels.row_attention import row_attention


def oracle(query: Tensor, key: Tensor, mask: Tensor | None, logits: bool) -> Tensor:
    query, key = query.double(), key.double().repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("brhd,blhd->brhl", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        seen = mask[:, None, None] if mask.dim() == 2 else mask[:, :, None]
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores if logits else scores.softmax(-1).nan_to_num(0.0)


def inputs(batch: int, rows: int, heads: int, kv_heads: int, keys: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    # Views into larger tensors, as a fused q/k/v projection gives them.
    query = torch.randn(batch, rows, heads, 2 * dim, dtype=torch.float32).to(dtype)[..., ::2]
    key = torch.randn(batch, kv_heads, keys, dim, dtype=torch.float32).to(dtype).transpose(1, 2)
    return [query, key]


@pytest.mark.parametrize("keys", [1, 7, 63, 577, 2880, 10000])
def test_reference(keys: int) -> None:
    query, key = inputs(2, 2, 4, 2, keys, 16, torch.float32)
    mask = torch.rand(2, keys) < 0.7
    torch.testing.assert_close(
        row_attention(query, key).double(), oracle(query, key, None, False), atol=1e-6, rtol=1e-5
    )
    found = row_attention(query, key, mask=mask, reduce="mean").double()
    torch.testing.assert_close(found, oracle(query, key, mask, False).mean(2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["none", "mean", "sum"])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("masked", [None, "keys", "rows"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_modes(implementation: str, masked: str | None, logits: bool, reduce: str, device: str) -> None:
    query, key = inputs(2, 3, 4, 2, 75, 20, torch.float32)
    mask = {None: None, "keys": torch.rand(2, 75) < 0.5, "rows": torch.rand(2, 3, 75) < 0.5}[masked]
    if mask is not None:
        mask[1] = False
    found = row_attention(
        query.to(device),
        key.to(device),
        mask=None if mask is None else mask.to(device),
        reduce=reduce,
        logits=logits,
        implementation=implementation,
    )
    expected = oracle(query, key, mask, logits)
    expected = expected if reduce == "none" else expected.mean(2) if reduce == "mean" else expected.sum(2)
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_kernel_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    query, key = inputs(1, 1, 6, 2, 63, 64, torch.float32)
    query, key = query.to(dtypes[0]).to(device), key.to(dtypes[1]).to(device)
    found = row_attention(query, key, scale=0.3, implementation="triton")
    assert found.dtype == torch.float32
    expected = row_attention(query, key, scale=0.3, implementation="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", [1, 7])
def test_kernel_on_few_keys(keys: int, device: str) -> None:
    query, key = inputs(1, 1, 1, 1, keys, 8, torch.float32)
    found = row_attention(query.to(device), key.to(device), implementation="triton")
    torch.testing.assert_close(found.cpu(), row_attention(query, key), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("keys", [577, 2880, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_on_many_keys(dtype: torch.dtype, keys: int, device: str) -> None:
    query, key = (tensor.to(device) for tensor in inputs(5, 33, 28, 4, keys, 128, dtype))
    mask = torch.rand(5, keys, device=device) < 0.9
    found = row_attention(query, key, mask=mask, reduce="mean", implementation="triton")
    expected = row_attention(query, key, mask=mask, reduce="mean", implementation="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_broken_neighbour_does_not_spread(implementation: str, device: str) -> None:
    query, key = (tensor.to(device) for tensor in inputs(2, 1, 2, 1, 40, 8, torch.float32))
    before = row_attention(query, key, implementation=implementation)
    query[0], key[0, 3] = torch.inf, torch.nan
    after = row_attention(query, key, implementation=implementation)
    assert torch.equal(before[1], after[1])
    assert after[0].isnan().all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_nothing_to_look_at(implementation: str, device: str) -> None:
    query, key = torch.ones(2, 1, 2, 8, device=device), torch.ones(2, 0, 2, 8, device=device)
    assert row_attention(query, key, reduce="mean", implementation=implementation).shape == (2, 1, 0)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 1, 4, 8), (1, 5, 3, 8)), {}, "multiple of kv_heads"),
        (((1, 1, 4, 8), (2, 5, 4, 8)), {}, "agree in batch"),
        (((1, 4, 8), (1, 5, 4, 8)), {}, "query must be"),
        (((1, 1, 4, 8), (1, 5, 4, 8)), {"reduce": "max"}, "'max' is not one of none, mean, sum"),
        (((1, 1, 4, 8), (1, 5, 4, 8)), {"mask": torch.ones(1, 5)}, "mask must be bool"),
        (((1, 1, 4, 8), (1, 5, 4, 8)), {"mask": torch.ones(1, 4, dtype=torch.bool)}, r"shape \(1, 5\)"),
    ],
)
def test_bad_arguments(shapes: tuple[tuple[int, ...], ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_attention(torch.zeros(shapes[0]), torch.zeros(shapes[1]), **options)  # type: ignore[arg-type]
