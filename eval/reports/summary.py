"""From token records and task scores to the numbers of a table row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedConfig

from vlmprune.eval.accuracy.paired import compare_paired
from vlmprune.eval.accuracy.request_records import RequestRecord
from vlmprune.eval.accuracy.task_scores import TaskScore
from vlmprune.eval.flops import (
    STAGES,
    LanguageShape,
    equivalent_tokens,
    fastv_formula,
    pyramiddrop_formula,
    request_cost,
)
from vlmprune.eval.run.cells import FULL, Cell
from vlmprune.eval.run.csv_lines import csv_text
from vlmprune.eval.run.figures import keep_text
from vlmprune.methods.base import Method

from .hard_items import hard_items
from .seeds import merge_seeds

NOT_COUNTED = "not counted"
"""What stands for the FLOPs of a method that does not say what it computes."""


def summarise_requests(
    config: PreTrainedConfig, records: Sequence[RequestRecord], element_size: int, method: Method | None = None
) -> dict[str, Any]:
    """Means over requests: token counts, MACs and FLOPs by stage, KV-cache bytes, the papers' formulas.

    `method` is what chose the tokens, None for the unpruned model. The papers' formulas are given visual tokens only, as the
    papers do; everything else counts visual and text tokens.
    """
    shape = LanguageShape.from_config(config)
    costs = [
        request_cost(config, r.work, r.visual_per_layer, r.text_tokens, r.new_tokens, method, r.images) for r in records
    ]
    macs: dict[str, float | None] = {stage: _mean([getattr(cost, stage) for cost in costs]) for stage in STAGES}
    macs["prefill_total"] = fmean(cost.prefill_total for cost in costs)
    entering = [r.visual_per_layer for r in records]
    return {
        "requests": len(records),
        "visual_tokens_before": fmean(r.visual_before for r in records),
        "visual_tokens_after": fmean(equivalent_tokens(layers) for layers in entering),
        "visual_tokens_last_layer": fmean(layers[-1] for layers in entering),
        "text_tokens": fmean(r.text_tokens for r in records),
        "new_tokens": fmean(r.new_tokens for r in records),
        "macs": macs,
        "flops": {stage: None if value is None else 2 * value for stage, value in macs.items()},
        "kv_cache_bytes": fmean(
            shape.cache_bytes([n + r.text_tokens for n in r.visual_per_layer], element_size) for r in records
        ),
        "fastv_formula": fmean(fastv_formula(layers, shape.hidden, shape.ffn) for layers in entering),
        "pyramiddrop_formula": fmean(pyramiddrop_formula(layers, shape.hidden, shape.ffn) for layers in entering),
    }


def _mean(values: Sequence[int | None]) -> float | None:
    """The mean, None where a value was not counted."""
    counted = [value for value in values if value is not None]
    return fmean(counted) if len(counted) == len(values) else None


def cell_result(
    cell: Cell, scores: Mapping[str, TaskScore], cost: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """What is stored of a finished cell."""
    return {
        "method": cell.method,
        "title": cell.title,
        "keep": cell.keep,
        "parameters": dict(cell.parameters),
        "repeats": cell.repeats,
        "tasks": {name: asdict(score) for name, score in scores.items()},
        "cost": dict(cost),
        "seconds": dict(seconds),
    }


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    `relative` is the mean over tasks of score divided by the unpruned model's score, as papers print it; `paired` (see
    `compare_paired`) has the ratio of the means, which the tables show, with its interval. `seeds` are the averages of a cell
    that was run with several seeds, whose mean the row shows. `hard` is the mean score on the items that need the full
    resolution and their number (see `hard_items`). `times` are spreads in milliseconds (see `time_cells`).
    """

    title: str
    keep: float | int | None
    before: float
    after: float
    flops: dict[str, float | None]
    kv_cache_bytes: float
    scores: dict[str, float]
    average: float
    relative: float | None
    paired: dict[str, Any] | None
    times: dict[str, Any]
    seeds: tuple[float, ...]
    hard: tuple[float, int] | None
    result: dict[str, Any]

    @property
    def is_full(self) -> bool:
        """Whether this is the unpruned model."""
        return self.title == FULL

    @property
    def prefill_flops(self) -> float:
        """FLOPs to the first token, without a selection that is not counted."""
        return self.flops["prefill_total"] or 0.0

    @property
    def prefill_ms(self) -> float | None:
        """Median time to the first token, where it was measured."""
        return self.times["prefill_ms"]["median"] if self.times else None

    @property
    def keep_text(self) -> str:
        """The budget as it was given."""
        return keep_text(self.keep)


def make_rows(results: Sequence[Mapping[str, Any]], timing: Mapping[str, Any]) -> list[Row]:
    """Rows of finished cells, the unpruned one first in `results`; cells that differ by their seed alone become one row."""
    merged = merge_seeds(results)
    full = next((result for result in merged if result["method"] == FULL), None)
    rows = []
    for result in merged:
        scores = {name: task["score"] for name, task in result["tasks"].items()}
        rows.append(
            Row(
                title=result["title"],
                keep=result["keep"],
                before=result["cost"]["visual_tokens_before"],
                after=result["cost"]["visual_tokens_after"],
                flops=result["cost"]["flops"],
                kv_cache_bytes=result["cost"]["kv_cache_bytes"],
                scores=scores,
                average=fmean(scores.values()),
                relative=relative_score(result["tasks"], full["tasks"]) if full else None,
                paired=compare_paired(result["tasks"], full["tasks"]) if full and result is not full else None,
                times=timing.get(result["label"]) or {},
                seeds=tuple(result.get("seeds", ())),
                hard=hard_items(result, merged),
                result=dict(result),
            )
        )
    return rows


def relative_score(tasks: Mapping[str, Any], full: Mapping[str, Any]) -> float | None:
    """Mean over tasks of score over full score (its inverse where less is better); None where a divisor is 0."""
    ratios = []
    for name, task in tasks.items():
        above, below = task["score"], full[name]["score"]
        if not task["higher_is_better"]:
            above, below = below, above
        if not below:
            return None
        ratios.append(above / below)
    return fmean(ratios)


def results_csv(rows: Sequence[Row]) -> str:
    """One line a cell: budget, tokens, GFLOPs by stage, cache, times, scores."""
    return csv_text([{key: _csv_text(value) for key, value in _line(row).items()} for row in rows])


def _line(row: Row) -> dict[str, Any]:
    cost, times = row.result["cost"], row.times
    line: dict[str, Any] = {
        "method": row.title,
        "keep": None if row.keep is None else row.keep_text,
        "visual_tokens_before": row.before,
        "visual_tokens_after": row.after,
        "text_tokens": cost["text_tokens"],
        "new_tokens": cost["new_tokens"],
        **{f"gflops_{stage}": _giga(row.flops.get(stage, 0.0)) for stage in STAGES},
        "gflops_prefill_total": row.prefill_flops / 1e9,
        "kv_cache_bytes": row.kv_cache_bytes,
        "fastv_formula_gmacs": cost["fastv_formula"] / 1e9,
        "pyramiddrop_formula_gmacs": cost["pyramiddrop_formula"] / 1e9,
    }
    for kind in ("prefill_ms", "decode_ms_per_token"):
        for part, ending in (("median", ""), ("q25", "_q25"), ("q75", "_q75")):
            line[f"{kind}{ending}"] = times.get(kind, {}).get(part)
    line |= row.scores
    line |= {"average": row.average, "seeds": len(row.seeds) or None, "relative": row.relative}
    if row.seeds:
        line |= {"average_lowest_seed": min(row.seeds), "average_highest_seed": max(row.seeds)}
    line |= {"hard_items_score": row.hard[0] if row.hard else None, "hard_items": row.hard[1] if row.hard else None}
    return line | _paired_columns(row.paired or {})


def _paired_columns(paired: Mapping[str, Any]) -> dict[str, Any]:
    difference, ratio = paired.get("difference_95") or (None, None), paired.get("ratio_95") or (None, None)
    return {
        "difference": paired.get("difference"),
        "difference_low": difference[0],
        "difference_high": difference[1],
        "ratio": paired.get("ratio"),
        "ratio_low": ratio[0],
        "ratio_high": ratio[1],
        "better": paired.get("better"),
        "worse": paired.get("worse"),
        "items": paired.get("items"),
        "no_interval": paired.get("reason") or paired.get("ratio_reason"),
    }


def _giga(flops: float | None) -> float | str:
    return NOT_COUNTED if flops is None else flops / 1e9


def _csv_text(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"
