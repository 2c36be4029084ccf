"""What a benchmark would do and about how long it would take, without doing it."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.picture_check import check_prompts
from vlmprune.eval.accuracy.prompts import read_prompts
from vlmprune.eval.accuracy.questions import user_turn
from vlmprune.eval.accuracy.task_index import documents_of, find_tasks
from vlmprune.eval.accuracy.task_scores import quiet_lmms_eval
from vlmprune.eval.bench import BenchOptions, cells_for, configuration, open_model, shown_modalities
from vlmprune.eval.bench_times import Turn, turns_of_tasks
from vlmprune.eval.run.result_folder import ResultFolder


def print_plan(options: BenchOptions, data: Path | None = None, new_tokens: int = 32) -> float:
    """Print cells, items and an estimate; nothing is written. Returns the estimated seconds.

    One batch of the unpruned model is answered and timed; every cell is counted as slow as it.

    Raises:
        ResultFolderError: `options.out` holds other results.
        PromptDataError: a picture of `data` cannot be used.
        UnsupportedMethodError: a method asked for by name does not serve what a task shows.
    """
    output = Console(width=100)
    loaded, stored = open_model(options), 0
    if data is None:
        with quiet_lmms_eval():
            tasks = find_tasks(options.tasks, loaded.model.config.model_type, options.task_folders)
        cells, left_out = cells_for(options, loaded, *shown_modalities(tasks))
        folder = ResultFolder(options.out, configuration(options, loaded, tasks), write=False)
        stored = sum(folder.has(cell) for cell in cells)
        sizes = {name: len(documents_of(task)) for name, task in tasks.items()}
        counts = {name: size if options.limit is None else min(size, options.limit) for name, size in sizes.items()}
        turns = turns_of_tasks(tasks, options.limit, options.batch_size)
    else:
        cells, left_out = cells_for(options, loaded)
        prompts = read_prompts(data, options.limit)
        check_prompts(prompts)
        counts = {str(data): len(prompts)}
        turns = [(prompt.text, prompt.images) for prompt in prompts[: options.batch_size]]
    seconds = _seconds_of_batch(LiveModel(loaded.model, loaded.processor), turns, new_tokens)
    items = sum(counts.values())
    total = seconds / len(turns) * items * (len(cells) - stored) + options.timing_seconds
    output.print(
        f"{len(cells)} cells, {stored} of them stored: " + ", ".join(cell.label for cell in cells), markup=False
    )
    for item in left_out:
        output.print(item.note, soft_wrap=True, markup=False, highlight=False)
    output.print(f"{items} items each: " + ", ".join(f"{name} {count}" for name, count in counts.items()), markup=False)
    output.print(
        f"About {_duration(total)} at most: {seconds / len(turns):.2g} s an item for the unpruned model, which answers "
        f"{new_tokens} tokens or fewer, and {options.timing_seconds:g} s for times.",
        soft_wrap=True,
    )
    return total


def _seconds_of_batch(live: LiveModel, turns: list[Turn], new_tokens: int) -> float:
    conversations = [user_turn(text, visuals) for text, visuals in turns]
    live.reply(conversations, 1)
    start = time.perf_counter()
    live.reply(conversations, new_tokens)
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
