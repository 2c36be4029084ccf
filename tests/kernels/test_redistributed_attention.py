"""Changed attention outputs against whole attention maps in float64."""

import pytest
import torch

from vlmprune.kernels.redistributed_attention import SINK, VALID, VISUAL, redistributed_attention

SETTINGS = {"moved": 0.4, "highest_share": 0.5, "lowest_weight": 0.2}


def by_maps(query, key, value, flags, last, moved, highest_share, lowest_weight):
    """Outputs before and after, from whole maps changed weight by weight, and which rows changed."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    before, after = torch.zeros_like(query), torch.zeros_like(query)
    changed = torch.zeros(query.shape[:3], dtype=torch.bool)
    for b, r, h in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        seen = [k for k in range(int(last[b, r]) + 1) if flags[b, k] & VALID]
        if not seen:
            continue
        logits = torch.stack([query[b, r, h] @ key[b, k, h // groups] for k in seen]) * query.shape[-1] ** -0.5
        weights = torch.zeros(key.shape[1], dtype=torch.float64)
        weights[seen] = logits.softmax(0)
        visual = [k for k in range(key.shape[1]) if flags[b, k] & VISUAL]
        sinks = [k for k in range(key.shape[1]) if flags[b, k] & SINK]
        both = [k for k in visual if k in sinks]
        rest = [k for k in visual if k not in sinks]
        new = weights.clone()
        share = (weights[both] + 1e-6).sum() / (weights[visual] + 1e-6).sum() if visual else 1.0
        if both and share <= highest_share and weights[visual].sum() >= lowest_weight and weights[rest].sum() > 0:
            changed[b, r, h] = True
            freed = moved * weights[sinks].sum()
            new[sinks] *= 1 - moved
            new[rest] += freed * weights[rest] / weights[rest].sum()
        torch.testing.assert_close(new.sum(), weights.sum())
        before[b, r, h], after[b, r, h] = weights @ value[b, :, h // groups], new @ value[b, :, h // groups]
    return before, after, changed


def inputs(batch, rows, heads, kv_heads, keys, dim, dtype=torch.float32):
    query = torch.randn(batch, rows, heads, 2 * dim).to(dtype)[..., ::2]
    key, value = (torch.randn(batch, kv_heads, keys, dim).to(dtype).transpose(1, 2) for _ in range(2))
    flags = torch.full((batch, keys), VALID, dtype=torch.uint8)
    flags |= VISUAL * (torch.rand(batch, keys) < 0.5).to(torch.uint8)
    flags |= SINK * (torch.rand(batch, keys) < 0.2).to(torch.uint8)
    if keys > 3:
        flags[0, :3] = 0
        flags[0, 3] = VALID | VISUAL | SINK
    last = torch.arange(keys - rows, keys).expand(batch, -1).clone()
    last[-1, 0] = -1
    return query, key, value, flags, last


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 2, 9, 16), (2, 5, 4, 2, 40, 16), (2, 18, 2, 1, 21, 20), (3, 2, 6, 3, 70, 24)], ids=str
)
def test_outputs_change_as_whole_maps_do(shape, implementation, device):
    arguments = inputs(*shape)
    before, after, changed = by_maps(*arguments, **SETTINGS)
    moved = [values.to(device) for values in arguments]
    delta, selected = redistributed_attention(*moved, **SETTINGS, implementation=implementation)
    assert torch.equal(selected.cpu(), changed)
    assert shape[0] == 1 or (changed.any() and not changed.all())
    torch.testing.assert_close(before + delta.cpu().double(), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_without_visual_sinks_nothing_changes(implementation, device):
    query, key, value, flags, last = inputs(2, 3, 4, 2, 30, 16)
    flags &= ~((flags & VISUAL) << 1)
    delta, selected = redistributed_attention(
        *(values.to(device) for values in (query, key, value, flags, last)), **SETTINGS, implementation=implementation
    )
    assert not selected.any()
    assert (delta == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_dtypes(dtype, device):
    arguments = [values.to(device) for values in inputs(2, 4, 4, 2, 40, 16, dtype)]
    wide = [values.float() if values.is_floating_point() else values for values in arguments]
    found, _ = redistributed_attention(*arguments, **SETTINGS, implementation="triton")
    expected, _ = redistributed_attention(*wide, **SETTINGS, implementation="torch")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 2, 1, 5, 16), (2, 0, 2, 1, 5, 16)], ids=str)
def test_nothing_to_do(shape, implementation, device):
    batch, rows, heads, _, keys, dim = shape
    query, key = torch.randn(batch, rows, heads, dim), torch.randn(batch, keys, 1, dim)
    flags, last = torch.ones(batch, keys, dtype=torch.uint8), torch.zeros(batch, rows, dtype=torch.int64)
    delta, selected = redistributed_attention(
        *(values.to(device) for values in (query, key, key, flags, last)), **SETTINGS, implementation=implementation
    )
    assert delta.shape == query.shape
    assert selected.shape == query.shape[:3]


def test_bad_arguments():
    query, key, value, flags, last = inputs(1, 2, 2, 1, 5, 16)
    for wrong, message in (
        ((query[0], key, value, flags, last), "query must be"),
        ((query, key, value[:, 1:], flags, last), "key and value"),
        ((query[..., 1:], key, value, flags, last), "agree in batch and head_dim"),
        ((query, key, value, flags.bool(), last), "flags must be uint8"),
        ((query, key, value, flags, last[:, 1:]), "last must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            redistributed_attention(*wrong, **SETTINGS)
