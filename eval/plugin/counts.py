"""What the requests of the lmms-eval plug-in cost, in the places that lmms-eval has for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from transformers import PreTrainedModel

from vlmprune.eval.accuracy.request_records import RequestRecord
from vlmprune.eval.flops import equivalent_tokens, request_cost
from vlmprune.eval.reports.summary import summarise_requests
from vlmprune.methods.base import Method


@dataclass
class RequestCounts(TokenCounts):
    """Tokens and FLOPs of one request, under "token_counts" of its sample.

    `input_tokens` are text and visual tokens that the language model reads, visual ones averaged over its layers;
    `flops` those until the first token, `flops_selection` the method's own among them, None where it does not say.
    """

    visual_tokens_before: int = 0
    visual_tokens_after: float = 0.0
    flops: int = 0
    flops_selection: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """All that is known, by name."""
        after = round(self.visual_tokens_after, 1)
        own = {"visual_tokens_before": self.visual_tokens_before, "visual_tokens_after": after, "flops": self.flops}
        return {**super().to_dict(), **own, "flops_selection": self.flops_selection}


def counts_of(model: PreTrainedModel, records: Sequence[RequestRecord], method: Method | None) -> list[RequestCounts]:
    """The counts of every record; `method` is what chose the tokens."""
    found = []
    for record in records:
        cost = request_cost(
            model.config,
            record.work,
            record.visual_per_layer,
            record.text_tokens,
            record.new_tokens,
            method,
            record.images,
        )
        after = equivalent_tokens(record.visual_per_layer)
        found.append(
            RequestCounts(
                input_tokens=record.text_tokens + round(after),
                output_tokens=record.new_tokens,
                visual_tokens_before=record.visual_before,
                visual_tokens_after=after,
                flops=2 * cost.prefill_total,
                flops_selection=None if cost.selection is None else 2 * cost.selection,
            )
        )
    return found


def log_means(
    model: PreTrainedModel,
    records: Sequence[RequestRecord],
    method: Method | None,
    model_seconds: float,
    hook_seconds: float,
) -> None:
    """Hand the means over requests to lmms-eval, which has them under "throughput" in its results and prints them.

    Selecting is what the method's hooks took in prefill and decoding, the tower's own work left out.
    """
    if not records:
        return
    summary = summarise_requests(model.config, records, model.dtype.itemsize, method)
    tokens = sum(record.new_tokens for record in records)
    selection = summary["flops"]["selection"]
    log_metrics(
        total_elapsed_time=model_seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / model_seconds if model_seconds else 0.0,
        additional_metrics={
            "total_requests": len(records),
            "visual_tokens_before": summary["visual_tokens_before"],
            "visual_tokens_after": summary["visual_tokens_after"],
            "gflops_to_first_token": summary["flops"]["prefill_total"] / 1e9,
            **({} if selection is None else {"gflops_of_selecting": selection / 1e9}),
            "kv_cache_mib": summary["kv_cache_bytes"] / 2**20,
            "milliseconds_of_selecting": 1000 * hook_seconds / len(records),
        },
    )
