"""How far a pruned model strays from the unpruned one on pictures and prompts without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlmprune.errors import BudgetError
from vlmprune.eval.flops import equivalent_tokens
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.run.cells import Cell, LeftOut, not_reachable
from vlmprune.eval.run.csv_lines import write_csv
from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.progress import progress_bar
from vlmprune.eval.run.ranks import Ranks
from vlmprune.eval.run.result_folder import ResultFolder, write_json
from vlmprune.eval.run.table_style import cost_style

from .live_model import LiveModel
from .prompts import Prompt, data_checksum, read_prompts
from .questions import user_turn
from .request_records import RequestRecord


@dataclass(frozen=True, eq=False)
class Reply:
    """Greedy answer to a prompt and log-probabilities [vocabulary] of its first token."""

    prompt: int
    tokens: tuple[int, ...]
    first: Tensor


@dataclass(frozen=True)
class Agreement:
    """One prompt under a pruned model, compared with the unpruned one."""

    prompt: int
    visual_tokens: float
    same_answer: bool
    same_first_token: bool
    kl: float


@dataclass(frozen=True)
class Fidelity:
    """Agreement with the unpruned model. `kl` is the mean of KL(unpruned || pruned) of the first token, in nats."""

    title: str
    keep: float | int | None
    items: int
    visual_tokens: float
    same_answer: float
    same_first_token: float
    kl: float
    kl_worst: float


@dataclass(frozen=True)
class FidelityOptions:
    """What `run_fidelity` compares; `left_out` is what was asked for and is known to be impossible."""

    data: Path
    cells: Sequence[Cell]
    out: Path
    limit: int | None = None
    batch_size: int = 1
    new_tokens: int = 32
    left_out: Sequence[LeftOut] = ()


def run_fidelity(loaded: LoadedModel, options: FidelityOptions, console: Console | None = None) -> list[Fidelity]:
    """Compare every cell with the unpruned model, print a table, write fidelity.json and fidelity.csv.

    Finished cells of an interrupted run are kept; the unpruned replies are made again where some cell is missing. Several
    processes share the batches, which are those of one process, and only the first writes, prints and returns rows.
    Budgets that some picture does not allow are left out with a note.

    Raises:
        BudgetError: nothing else was asked for.
    """
    ranks = Ranks()
    console = console or Console(stderr=True, quiet=not ranks.is_main)
    prompts = read_prompts(options.data, options.limit)
    configuration = {
        "kind": "fidelity",
        "model": loaded.describe(),
        "data": data_checksum(prompts),
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
    }
    cells = [cell for cell in options.cells if not cell.is_full]
    ranks.require_same("the configuration", configuration)
    ranks.require_same("the cells", [cell.label for cell in cells])
    folder = ranks.on_main(lambda: ResultFolder(options.out, configuration))
    todo = ranks.on_main(lambda: [cell for cell in cells if not folder.has(cell)])
    batches = [
        (start, prompts[start : start + options.batch_size]) for start in range(0, len(prompts), options.batch_size)
    ][ranks.rank :: ranks.count]
    own = sum(len(batch) for _, batch in batches)
    live = LiveModel(loaded.model, loaded.processor, batch_size=options.batch_size)
    left_out = list(options.left_out)
    with progress_bar(console) as progress:
        bar = progress.add_task("full", total=own * (len(todo) + 1 if todo else 0))
        advance = partial(progress.advance, bar)
        unpruned = replies(live, batches, options.new_tokens, advance) if todo else []
        for number, cell in enumerate(todo, start=1):
            progress.update(bar, description=f"[{number}/{len(todo)}] {cell.label:<24.24}")
            with cell.applied_to(loaded.model):
                live.reset(cell.is_pruned, cell.resolution(loaded.model, loaded.processor))
                error: BudgetError | None = None
                try:
                    found = replies(live, batches, options.new_tokens, advance)
                except BudgetError as raised:
                    error = raised
            errors = [reason for reason in ranks.gathered([error]) if reason is not None]
            if errors:
                left_out.append(not_reachable(cell, errors[0]))
                if len(left_out) - len(options.left_out) == len(cells):
                    raise errors[0]
                continue
            agreements = ranks.gathered(agreement(unpruned, found, live.records))
            if ranks.is_main:
                folder.write(cell, asdict(summarise_agreement(cell, agreements)))
    rows: list[Fidelity] = []
    if ranks.is_main:
        rows = [_stored(folder.read(cell)) for cell in cells if folder.has(cell)]
        _write(folder, rows, left_out)
    ranks.close()
    return rows


def _write(folder: ResultFolder, rows: Sequence[Fidelity], left_out: Sequence[LeftOut]) -> None:
    write_json(
        folder.path / "fidelity.json",
        {
            "machine": describe_machine(),
            "configuration": folder.configuration,
            "rows": [asdict(row) for row in rows],
            "left_out": [item.described() for item in left_out],
        },
    )
    write_csv(folder.path / "fidelity.csv", [asdict(row) for row in rows])
    output = Console(width=100)
    output.print(fidelity_table(rows))
    for item in left_out:
        output.print(item.note, soft_wrap=True, markup=False, highlight=False)
    output.print(f"Written to {folder.path}", soft_wrap=True)


def replies(
    live: LiveModel, batches: Sequence[tuple[int, Sequence[Prompt]]], new_tokens: int, on_progress: Callable[[int], Any]
) -> list[Reply]:
    """Greedy token ids and first-token log-probabilities (on the CPU) of every prompt, as the model stands.

    `batches` come with the number of their first prompt.
    """
    found: list[Reply] = []
    for start, batch in batches:
        tokens, first = live.reply([user_turn(prompt.text, prompt.images) for prompt in batch], new_tokens)
        numbered = enumerate(zip(tokens, first.cpu(), strict=True), start=start)
        found.extend(Reply(number, answer, row) for number, (answer, row) in numbered)
        on_progress(len(batch))
    return found


def agreement(full: Sequence[Reply], pruned: Sequence[Reply], records: Sequence[RequestRecord]) -> list[Agreement]:
    """Prompt by prompt, two runs over the same prompts; `records` are those of the pruned one."""
    return [
        Agreement(
            prompt=after.prompt,
            visual_tokens=equivalent_tokens(record.visual_per_layer),
            same_answer=before.tokens == after.tokens,
            same_first_token=bool(before.first.argmax() == after.first.argmax()),
            kl=(before.first.exp() * (before.first - after.first)).sum().item(),
        )
        for before, after, record in zip(full, pruned, records, strict=True)
    ]


def summarise_agreement(cell: Cell, agreements: Sequence[Agreement]) -> Fidelity:
    """Means over prompts, in their order."""
    ordered = sorted(agreements, key=lambda one: one.prompt)
    return Fidelity(
        title=cell.title,
        keep=cell.keep,
        items=len(ordered),
        visual_tokens=fmean(one.visual_tokens for one in ordered),
        same_answer=fmean(one.same_answer for one in ordered),
        same_first_token=fmean(one.same_first_token for one in ordered),
        kl=fmean(one.kl for one in ordered),
        kl_worst=max(one.kl for one in ordered),
    )


def _stored(content: dict[str, Any]) -> Fidelity:
    return Fidelity(**{field.name: content[field.name] for field in fields(Fidelity)})


def fidelity_table(rows: Sequence[Fidelity]) -> Table:
    """Shares in percent, divergence in nats."""
    table = cost_style(f"Agreement with the unpruned model on {rows[0].items} prompts")
    table.add_column("method", no_wrap=True, max_width=24)
    for name in ("keep", "tokens", "same answer %", "same first token %", "KL (nats)", "worst KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row.title,
            keep_text(row.keep),
            f"{row.visual_tokens:.0f}",
            f"{100 * row.same_answer:.1f}",
            f"{100 * row.same_first_token:.1f}",
            f"{row.kl:.4f}",
            f"{row.kl_worst:.3f}",
            end_section=following is None or following.title != row.title,
        )
    return table
