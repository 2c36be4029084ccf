"""Comparing results with a case's expected tensors by the case's `compare` rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

# A hidden state of a whole model is a sum of products over several layers, whose order depends on the CPU: its error goes
# with the tensor's scale and not with the element, so that elements near 0 differ by any factor. Where the rule of such a
# case does not name a float tensor, it may differ by this share of its largest value: 128 roundings of fp32, where two
# CPUs differed by 15.
MODEL_ROUNDING = 2.0**-17


def differences(case: Mapping[str, Any], inputs: Tensors, got: Tensors, expected: Tensors) -> list[str]:
    """Return one line per expected tensor that `got` does not match; results that were left out are not compared."""
    rule = str(case["compare"])
    if "set of distinct vectors" in rule:
        return _distinct_vectors(case, inputs, got)
    found = []
    for name, wanted in expected.items():
        if name not in got:
            continue
        result = got[name]
        if wanted.dtype == torch.int64:
            agrees = _weaker_rule(rule, result, wanted)
            if agrees is None:
                agrees = _rule_of_a_name(rule, name, result, expected)
            if agrees is not None:
                if not agrees:
                    found.append(f"{name}: {result.tolist()} instead of {wanted.tolist()}, by the rule {rule!r}")
                continue
        if "every newline position to" in rule:
            result, wanted = (_same_newline(values, rule, inputs) for values in (result, wanted))
        if name == "output" and "rows of equal id compared as a multiset" in rule and "keep" in expected:
            result = _rows_in_the_order_of(result, wanted, expected["keep"])
        rtol, atol = _tolerance(case["compare"], name)
        if _is_hidden_state(case["compare"], name, wanted):
            atol = max(atol, MODEL_ROUNDING * float(wanted.abs().max()))
        line = _difference(result, wanted, rtol, atol)
        if line:
            found.append(f"{name}: {line}")
    return found


def _weaker_rule(rule: str, got: Tensor, expected: Tensor) -> bool | None:
    """Return whether indices agree by a rule that does not ask for the same in every place; None for all other rules."""
    overlap = re.search(r"overlap only: at least (\d+) of", rule)
    if overlap:
        return len(set(got.flatten().tolist()) & set(expected.flatten().tolist())) >= int(overlap.group(1))
    if rule.startswith("exact as a set"):
        return got.shape == expected.shape and set(got.tolist()) == set(expected.tolist())
    if "//2" in rule:
        # Tokens 2i and 2i + 1 are twins. Picks are compared in order; sorted indices are sorted again by their pair.
        ascending = bool((expected.diff() > 0).all())
        pairs = [values // 2 if not ascending else (values // 2).sort().values for values in (got, expected)]
        return got.shape == expected.shape and torch.equal(*pairs)
    return None


def _rule_of_a_name(rule: str, name: str, got: Tensor, expected: Tensors) -> bool | None:
    """Return whether indices agree by what a rule says of this name alone; None if it says nothing."""
    wanted = expected[name]
    if f"{name} (zero-length ones dropped)" in rule:
        return torch.equal(got[got > 0], wanted[wanted > 0])
    if f"{name} as a set" in rule:
        return got.shape == wanted.shape and set(got.tolist()) == set(wanted.tolist())
    overlap = re.match(r"at least (\d+) of (\d+)", rule)
    if overlap:
        missed = int(overlap.group(2)) - int(overlap.group(1))
        return got.shape == wanted.shape and len(set(wanted.tolist()) - set(got.tolist())) <= missed
    exchange = re.search(r"(\w+) only up to exchange of tokens with equal (\w+) \(or (\w+)\)", rule)
    if exchange is None:
        return None
    if name.startswith("keep") and "number of kept tokens exact" in rule:
        return got.shape == wanted.shape
    if name != exchange.group(1):
        return None
    means = [expected[each] for each in exchange.groups()[1:]]
    # The union of two choices: a token may be exchanged for one that the other choice holds too. The official means of tied
    # tokens differ by roundings.
    return all(
        one in others
        or any(bool(torch.isclose(mean[one], mean[other], rtol=1e-6)) for mean in means for other in others)
        for mine, others in ((got.tolist(), wanted.tolist()), (wanted.tolist(), got.tolist()))
        for one in mine
    )


def _difference(got: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    if expected.is_floating_point():
        close = torch.isclose(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
        gap = (got.double() - expected.double()).abs()
    else:
        close = got.to(torch.int64) == expected.to(torch.int64)
        gap = (got.to(torch.int64) - expected.to(torch.int64)).abs()
    if bool(close.all()):
        return None
    where = (~close).nonzero()[0].tolist()
    count, at = int((~close).sum()), tuple(where)
    return (
        f"{count} of {close.numel()} values differ, first at {where}: {got[at].item()} instead of {expected[at].item()}; "
        f"largest difference {gap.max().item():g}"
    )


def _rows_in_the_order_of(got: Tensor, expected: Tensor, keep: Tensor) -> Tensor:
    """Swap rows of equal ids, so that each comes where the expected row is nearest to it."""
    if got.shape != expected.shape:
        return got
    got = got.clone()
    for token in keep[1:][keep[1:] == keep[:-1]].unique():
        places = (keep == token).nonzero().flatten()
        left = list(got[places])
        for place in places.tolist():
            nearest = min(range(len(left)), key=lambda row: float((left[row] - expected[place]).abs().max()))
            got[place] = left.pop(nearest)
    return got


def _is_hidden_state(rule: str | Mapping[str, str], name: str, expected: Tensor) -> bool:
    """Whether a float tensor of a whole model falls under none of the rules that the case names."""
    if isinstance(rule, str) or "prefill_out" not in rule:
        return False
    return expected.is_floating_point() and name not in rule and not name.startswith("scores")


def _tolerance(rule: str | Mapping[str, str], name: str) -> tuple[float, float]:
    if not isinstance(rule, str):
        usual = rule.get("floats", "rtol 1e-4, atol 1e-7")
        rule = rule.get(name, rule.get("scores" if name.startswith("scores") else name, usual))
    if re.fullmatch(r"[\d.e-]+", rule):
        return float(rule), float(rule)
    relative = re.search(r"rtol ([\d.e-]+)", rule)
    absolute = re.search(r"(?:atol|within) ([\d.e-]+)", rule)
    if relative is None and absolute is None:
        return (1e-4, 1e-7) if "exact as usual" in rule else (0.0, 0.0)
    return float(relative.group(1)) if relative else 0.0, float(absolute.group(1)) if absolute else 1e-7


def _same_newline(indices: Tensor, rule: str, inputs: Tensors) -> Tensor:
    match = re.search(r"every newline position to (\d+)", rule)
    assert match is not None
    newline = int(match.group(1))
    features = inputs["features"]
    same = (features == features[newline]).all(-1)
    return torch.where(same[indices], newline, indices)


def _distinct_vectors(case: Mapping[str, Any], inputs: Tensors, got: Tensors) -> list[str]:
    picks = got["indices_sorted"]
    found = []
    if len(picks) != case["params"]["K"] or len(picks.unique()) != len(picks):
        found.append(f"indices_sorted: {picks.tolist()} are not {case['params']['K']} unique indices")
    distinct = len(inputs["features"][picks].unique(dim=0))
    if distinct != case["params"]["distinct"]:
        found.append(f"indices_sorted: {distinct} distinct vectors instead of {case['params']['distinct']}")
    return found
