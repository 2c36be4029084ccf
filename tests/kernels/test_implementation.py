"""Choice of the implementation."""

import importlib
import sys

import pytest
import torch

from vlmprune.kernels.attention_pagerank import attention_pagerank
from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.chosen_attention import chosen_attention
from vlmprune.kernels.compact import compact
from vlmprune.kernels.coverage import coverage
from vlmprune.kernels.coverage_from_values import coverage_from_values
from vlmprune.kernels.dpp_map import dpp_map
from vlmprune.kernels.max_min import max_min
from vlmprune.kernels.max_min_from_distances import max_min_from_distances
from vlmprune.kernels.max_sum import max_sum
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.merge_to_targets import merge_to_targets
from vlmprune.kernels.nearest_centre import nearest_centre
from vlmprune.kernels.peak_scores import peak_scores
from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.redistributed_attention import redistributed_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.kernels.shared import implementation
from vlmprune.kernels.shared.implementation import KernelUnavailableError, choose_implementation
from vlmprune.kernels.token_transition import token_transition
from vlmprune.kernels.unmerge import unmerge
from vlmprune.kernels.unpredicted_tokens import unpredicted_tokens
from vlmprune.kernels.windowed_topk import windowed_topk

ROWS, ONE = torch.ones(4, 8), torch.ones(1, dtype=torch.int64)
CALLS = {
    "segmented_topk": lambda name: segmented_topk(torch.ones(4), [0, 4], [2], implementation=name),
    "max_min": lambda name: max_min(ROWS, [0, 4], [2], implementation=name),
    "max_min_from_distances": lambda name: max_min_from_distances(torch.ones(4, 4), 2, implementation=name),
    "max_sum": lambda name: max_sum(ROWS, [0, 4], [2], [0], implementation=name),
    "row_attention": lambda name: row_attention(ROWS.view(1, 1, 4, 8), ROWS.view(1, 1, 4, 8), implementation=name),
    "redistributed_attention": lambda name: redistributed_attention(
        *(ROWS.view(1, 4, 1, 8),) * 3,
        *(torch.ones(1, 4, dtype=torch.uint8), torch.arange(4)[None]),
        **{"moved": 0.5, "highest_share": 0.5, "lowest_weight": 0.1, "implementation": name},
    ),
    "received_attention": lambda name: received_attention(ROWS[:, None], ROWS[:, None], [0, 4], implementation=name),
    "compact": lambda name: compact([ROWS[None]], torch.zeros(1, 2, dtype=torch.int64), implementation=name),
    "dpp_map": lambda name: dpp_map(ROWS, [0, 4], [2], implementation=name),
    "windowed_topk": lambda name: windowed_topk(torch.ones(1), ONE - 1, [1], implementation=name),
    "attention_pagerank": lambda name: attention_pagerank(ROWS[:, None], ROWS[:, None], [0, 4], 2, implementation=name),
    "coverage": lambda name: coverage(ROWS, [0, 4], [2], implementation=name),
    "coverage_from_values": lambda name: coverage_from_values(ROWS, 2, implementation=name),
    "bipartite_match": lambda name: bipartite_match(ROWS, ROWS, [0, 4], [0, 4], implementation=name),
    "merge_to_targets": lambda name: merge_to_targets(ROWS, ROWS, [0, 4], ONE, [0, 1], implementation=name),
    "unpredicted_tokens": lambda name: unpredicted_tokens(ROWS, [(2, 2)], implementation=name),
    "peak_scores": lambda name: peak_scores(ROWS, [0, 4], [2], implementation=name),
    "nearest_centre": lambda name: nearest_centre(ROWS, [0, 4], ONE, [0, 1], implementation=name),
    "unmerge": lambda name: unmerge(ROWS[None], ONE[None], implementation=name),
    "chosen_attention": lambda name: chosen_attention(ROWS[:, None], ROWS[:, None], ONE, implementation=name),
    "token_transition": lambda name: token_transition(ROWS, ROWS, implementation=name),
    "merge_scatter": lambda name: merge_scatter(ROWS, torch.zeros(4, dtype=torch.int64), None, 1, implementation=name),
}


def test_every_op_of_the_folder_is_here(ops: list[str]) -> None:
    assert sorted(CALLS) == ops


def test_the_device_chooses() -> None:
    assert choose_implementation("cpu") == "torch"
    assert choose_implementation("cuda") == ("triton" if implementation.TRITON_FOUND else "torch")
    assert choose_implementation("cuda", "torch") == "torch"


@pytest.mark.parametrize("op", CALLS)
def test_an_unknown_name_is_refused_with_the_nearest_one(op: str) -> None:
    with pytest.raises(ValueError, match=r"'tritn'.*torch, triton.*Did you mean 'triton'"):
        CALLS[op]("tritn")


@pytest.mark.parametrize("op", CALLS)
def test_a_forced_path_that_cannot_run_says_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "triton_is_interpreted", lambda: False)
    with pytest.raises(KernelUnavailableError, match="TRITON_INTERPRET=1"):
        CALLS[op]("triton")
    monkeypatch.setattr(implementation, "TRITON_FOUND", False)
    with pytest.raises(KernelUnavailableError, match="not installed"):
        CALLS[op]("triton")
    assert choose_implementation("cuda") == "torch"


def test_every_op_works_without_triton(ops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import vlmprune.kernels as package

    names = [name for name in sys.modules if name.startswith("vlmprune.kernels.")]
    for name in names:
        monkeypatch.setattr(package, name.rsplit(".", 1)[1], sys.modules[name], raising=False)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    fresh = {op: importlib.import_module(f"vlmprune.kernels.{op}") for op in ops}
    assert not sys.modules["vlmprune.kernels.shared.implementation"].TRITON_FOUND
    assert fresh["segmented_topk"].segmented_topk(torch.tensor([1.0, 3.0, 2.0]), [0, 3], [2]).tolist() == [1, 2]
    assert fresh["max_min"].max_min(torch.eye(3), [0, 3], [2]).tolist() == [0, 1]
    for name in [name for name in sys.modules if name.startswith("vlmprune.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
