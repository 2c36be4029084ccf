"""A model pruned in every way against the unpruned one, on a user's own pictures and prompts, with answers or without."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from vlmprune.errors import BudgetError
from vlmprune.eval.accuracy.answer_log import AnswerLog
from vlmprune.eval.accuracy.answer_scores import score_answer
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.own_answers import Agreement, Reply, agreement, replies
from vlmprune.eval.accuracy.paired_intervals import mean_interval, share_interval
from vlmprune.eval.accuracy.picture_check import check_prompts
from vlmprune.eval.accuracy.prompts import Prompt, data_checksum, read_prompts
from vlmprune.eval.accuracy.request_records import RequestRecord
from vlmprune.eval.bench_times import Turn, timed_cells
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.reports.bench_results import print_tables, write_results
from vlmprune.eval.reports.fidelity_table import fidelity_table
from vlmprune.eval.reports.summary import make_rows, summarise_requests
from vlmprune.eval.run.cells import Cell, LeftOut, not_reachable
from vlmprune.eval.run.csv_lines import write_csv
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.progress import progress_bar
from vlmprune.eval.run.ranks import Ranks
from vlmprune.eval.run.result_folder import ResultFolder, write_json
from vlmprune.eval.tune.from_table import closing_choice

ANSWER, SAME = "answer", "same_answer"
"""What the one task of own data is called: with answers and without."""
STORED = {"method": str, "title": str, "parameters": dict, "tasks": dict, "cost": dict, "agreement": dict}


@dataclass(frozen=True)
class Fidelity:
    """Agreement with the unpruned model. `kl` is the mean of KL(unpruned || pruned) of the first token, in nats.

    `same_answer_95` is Wilson's interval, `kl_95` one by bootstrap. `accuracy` is the mean score where there are answers.
    """

    title: str
    keep: float | int | None
    items: int
    visual_tokens: float
    same_answer: float
    same_first_token: float
    kl: float
    kl_worst: float
    same_answer_95: tuple[float, float] = (0.0, 1.0)
    kl_95: tuple[float, float] = (0.0, 0.0)
    accuracy: float | None = None


@dataclass(frozen=True)
class FidelityOptions:
    """What `run_fidelity` compares; `left_out` is what was asked for and is known to be impossible.

    `scoring` is how answers are scored (see `score_answer`); `timing_seconds` 0 measures no time.
    """

    data: Path
    cells: Sequence[Cell]
    out: Path
    limit: int | None = None
    batch_size: int = 1
    new_tokens: int = 32
    left_out: Sequence[LeftOut] = ()
    scoring: str = "auto"
    timing_seconds: float = 0.0
    timing_batch_sizes: Sequence[int] = (1,)
    command: Sequence[str] = ()


def run_fidelity(loaded: LoadedModel, options: FidelityOptions, console: Console | None = None) -> list[Fidelity]:
    """Compare every cell with the unpruned model, print tables, write fidelity.json, results.json and their CSV files.

    Every answer is stored in its cell, batch by batch as they come; the unpruned replies are made again where some cell is
    missing. Several processes share the batches, which are those of one process, and only the first writes, prints and
    returns rows. Budgets that some picture does not allow are left out with a note. Tables hold all cells of the folder.

    Raises:
        BudgetError: nothing else was asked for.
        PromptDataError: a picture cannot be used; before anything is run.
    """
    started = time.perf_counter()
    ranks = Ranks()
    console = console or Console(stderr=True, quiet=not ranks.is_main)
    prompts = read_prompts(options.data, options.limit)
    if ranks.is_main:
        check_prompts(prompts)
    configuration = {
        "kind": "fidelity",
        "model": loaded.describe(),
        "data": data_checksum(prompts),
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        **({"scoring": options.scoring} if prompts[0].answers else {}),
    }
    cells = [Cell(), *(cell for cell in options.cells if not cell.is_full)]
    ranks.require_same("the configuration", configuration)
    ranks.require_same("the cells", [cell.label for cell in cells])
    folder = ranks.on_main(lambda: ResultFolder(options.out, configuration, required=STORED))
    with ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(folder.locked())
        run = _OwnData(loaded, options, cells, prompts, folder, console, ranks, list(options.left_out))
        run.answer()
        rows = run.report(started) if ranks.is_main else []
    ranks.close()
    return rows


@dataclass(frozen=True)
class _OwnData:
    loaded: LoadedModel
    options: FidelityOptions
    cells: Sequence[Cell]
    prompts: Sequence[Prompt]
    folder: ResultFolder
    console: Console
    ranks: Ranks
    left_out: list[LeftOut]

    def answer(self) -> None:
        """Answer all prompts in every cell that is not stored yet."""
        options, ranks = self.options, self.ranks
        todo = ranks.on_main(lambda: [cell for cell in self.cells if not self.folder.has(cell)])
        if not todo:
            return
        size = options.batch_size
        starts = range(0, len(self.prompts), size)
        batches = [(start, self.prompts[start : start + size]) for start in starts][ranks.rank :: ranks.count]
        own = sum(len(batch) for _, batch in batches)
        live = LiveModel(self.loaded.model, self.loaded.processor, batch_size=size)
        pruned = [cell for cell in todo if not cell.is_full]
        with progress_bar(self.console) as progress:
            bar = progress.add_task("full", total=own * (len(pruned) + 1))
            advance = partial(progress.advance, bar)
            unpruned = replies(live, batches, options.new_tokens, advance)
            if Cell() in todo:
                self._store(Cell(), agreement(unpruned, unpruned, live.records), live.records)
            for number, cell in enumerate(pruned, start=1):
                progress.update(bar, description=f"[{number}/{len(pruned)}] {cell.label:<24.24}")
                log = AnswerLog(self.folder.unfinished(cell, ranks.rank))
                with cell.applied_to(self.loaded.model):
                    live.reset(cell.is_pruned, cell.resolution(self.loaded.model, self.loaded.processor))
                    found, error = self._replies(live, batches, unpruned, log, advance)
                errors = [reason for reason in ranks.gathered([error]) if reason is not None]
                if errors:
                    self.left_out.append(not_reachable(cell, errors[0]))
                    if len(self.left_out) - len(options.left_out) == len(self.cells) - 1:
                        raise errors[0]
                else:
                    self._store(cell, found, live.records)
                log.close()

    def _replies(
        self,
        live: LiveModel,
        batches: Sequence[tuple[int, Sequence[Prompt]]],
        unpruned: Sequence[Reply],
        log: AnswerLog,
        advance: Any,
    ) -> tuple[list[Agreement], BudgetError | None]:
        """Agreements of a cell, those that the log holds taken from it."""
        by_prompt = {reply.prompt: reply for reply in unpruned}
        found: list[Agreement] = []
        for start, batch in batches:
            numbers = range(start, start + len(batch))
            stored = [log.find(("reply", number, "", number)) for number in numbers]
            if all(one is not None for one in stored):
                found += [Agreement(**one[0]) for one in stored if one is not None]
                live.records += [one[1] for one in stored if one is not None and one[1] is not None]
                advance(len(batch))
                continue
            before = len(live.records)
            try:
                pruned = replies(live, [(start, batch)], self.options.new_tokens, advance)
            except BudgetError as error:
                return [], error
            records = live.records[before:]
            compared = agreement([by_prompt[number] for number in numbers], pruned, records)
            log.add(
                [
                    (("reply", one.prompt, "", one.prompt), asdict(one), record)
                    for one, record in zip(compared, records, strict=True)
                ]
            )
            found += compared
        return found, None

    def _store(self, cell: Cell, agreements: Sequence[Agreement], records: Sequence[RequestRecord]) -> None:
        everything = sorted(self.ranks.gathered(agreements), key=lambda one: one.prompt)
        all_records = self.ranks.gathered(records)
        if not self.ranks.is_main:
            return
        model = self.loaded.model
        task = own_task(self.prompts, everything, self.options.scoring)
        summary = asdict(summarise_agreement(cell, everything))
        if ANSWER in task:
            summary["accuracy"] = task[ANSWER]["score"]
        self.folder.write(
            cell,
            {
                "method": cell.method,
                "title": cell.title,
                "keep": cell.keep,
                "parameters": dict(cell.parameters),
                "repeats": cell.repeats,
                "tasks": task,
                "cost": summarise_requests(model.config, all_records, model.dtype.itemsize, cell.make_method()),
                "agreement": summary,
            },
        )

    def report(self, started: float) -> list[Fidelity]:
        """Measure times, print the tables, write the files."""
        missing = {(item.title, repr(item.keep)) for item in self.left_out}
        asked = [cell for cell in self.cells if (cell.title, repr(cell.keep)) not in missing]
        cells = [*asked, *self.folder.others(asked)]
        titles = list(dict.fromkeys(cell.title for cell in cells))
        cells.sort(key=lambda cell: titles.index(cell.title))
        stored = [self.folder.read(cell) for cell in cells]
        answered = time.perf_counter()
        timing = self._timing(cells)
        seconds = {"all": answered - started, "measuring_times": time.perf_counter() - answered}
        rows = [_stored(content["agreement"]) for content in stored if content["method"] != "full"]
        _write(self.folder, rows, self.left_out)
        prompts = [{"prompt": prompt.text, "images": prompt.images} for prompt in self.prompts]
        write_json(self.folder.path / "prompts.json", prompts)
        table = make_rows(stored, timing)
        choice = closing_choice(table)
        closing = None if choice is None else (choice.line, choice.sentence)
        write_results(self.options.command, self.folder, table, self.left_out, seconds, closing=closing)
        Console(width=100).print(fidelity_table(rows))
        print_tables(table, self.folder.path, self.left_out, closing=closing)
        return rows

    def _timing(self, cells: Sequence[Cell]) -> dict[str, Any]:
        options = self.options
        if not options.timing_seconds:
            return {}
        return timed_cells(
            LiveModel(self.loaded.model, self.loaded.processor),
            self._turns,
            cells,
            options.timing_batch_sizes,
            options.timing_seconds,
            self.folder.path / "timing.json",
            self.console,
        )

    def _turns(self, count: int) -> list[Turn]:
        count = min(count, len(self.prompts))
        chosen = [self.prompts[number * len(self.prompts) // count] for number in range(count)]
        return [(prompt.text, prompt.images) for prompt in chosen]


def own_task(prompts: Sequence[Prompt], agreements: Sequence[Agreement], scoring: str) -> dict[str, Any]:
    """The one task of own data as benchmarks store theirs: scores of answers, or of being the same where there are none."""
    labelled = bool(prompts[0].answers)
    samples, scores = [], []
    for one in agreements:
        prompt = prompts[one.prompt]
        score = (
            score_answer(one.answer, prompt.answers, prompt.choices, scoring) if labelled else float(one.same_answer)
        )
        scores.append(score)
        samples.append(
            {"doc_id": one.prompt, "answer": one.answer, "score": score, "same": one.same_answer, "kept": one.kept}
        )
    score = fmean(scores)
    task = {
        "metric": scoring if labelled else SAME,
        "score": score,
        "items": len(samples),
        "higher_is_better": True,
        "metrics": {scoring if labelled else SAME: score},
        "samples": samples,
    }
    return {ANSWER if labelled else SAME: task}


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
    write_csv(folder.path / "fidelity.csv", [_csv_line(row) for row in rows])


def _csv_line(row: Fidelity) -> Mapping[str, Any]:
    line = asdict(row)
    for name in ("same_answer_95", "kl_95"):
        line[f"{name}_low"], line[f"{name}_high"] = line.pop(name)
    return line


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
        same_answer_95=share_interval(sum(one.same_answer for one in ordered), len(ordered)),
        kl_95=mean_interval([one.kl for one in ordered]),
    )


def _stored(content: dict[str, Any]) -> Fidelity:
    return Fidelity(**{field.name: _pair(content[field.name]) for field in fields(Fidelity)})


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
