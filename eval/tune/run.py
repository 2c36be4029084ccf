"""`vlmprune tune`: the cheapest method and budget that meet a target on a user's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vlmprune.budget import Keep
from vlmprune.errors import ParameterError
from vlmprune.eval.accuracy.picture_check import check_prompts, check_tasks
from vlmprune.eval.accuracy.prompts import Prompt, data_checksum, read_prompts
from vlmprune.eval.accuracy.task_index import data_identity
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.run.cells import Cell, make_cells, usable_cells
from vlmprune.eval.run.result_folder import ResultFolder, write_json
from vlmprune.eval.run.text_towers import equipped, text_tower_of
from vlmprune.methods.registry import method_names

from .live_trial import LiveTrial
from .search import Choice, search
from .targets import Target
from .task_items import TaskItem, task_items

KEEPS: tuple[Keep, ...] = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
LEAST_ITEMS = 10


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        choice: the search's result.
        line: Python to paste; empty where nothing meets the target.
        sentence: what it saves and how sure it is.
    """

    choice: Choice
    line: str
    sentence: str


@dataclass(frozen=True)
class TuneOptions:
    """What to search. `minutes` None has no end; `out` is where measurements are kept, and a later call goes on from there."""

    target: Target
    methods: Sequence[tuple[str, dict[str, Any]]] = ()
    keeps: Sequence[Keep] = KEEPS
    limit: int | None = None
    new_tokens: int = 32
    minutes: float | None = None
    out: Path | None = None
    seed: int = 0
    scoring: str = "auto"


def tune_loaded(
    loaded: LoadedModel,
    data: Path | Sequence[Prompt] | Mapping[str, Any],
    options: TuneOptions,
    tell: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Search methods and budgets on prompts, or on the items of lmms-eval tasks (by name, as `find_tasks` gives them).

    Raises:
        ParameterError: too few items, or a target of accuracy without answers.
        PromptDataError: a prompt or picture cannot be used.
        ResultFolderError: `options.out` holds measurements of something else, or another run has it.
    """
    prompts: Sequence[Prompt | TaskItem]
    if isinstance(data, Mapping):
        prompts = task_items(data, options.limit)
    else:
        prompts = read_prompts(data, options.limit) if isinstance(data, Path) else list(data)[: options.limit]
    if len(prompts) < LEAST_ITEMS:
        raise ParameterError(
            f"{len(prompts)} items are too few to search and confirm on; allowed: {LEAST_ITEMS} or more."
        )
    own = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    if options.target.kind == "accuracy_drop" and own and not own[0].answers:
        raise ParameterError('accuracy_drop needs items with an "answer"; without answers: same_answers or kl.')
    if isinstance(data, Mapping):
        check_tasks(data, options.limit)
    check_prompts(own)
    if options.out is None:
        return _searched(loaded, prompts, options, None, tell)
    configuration = {
        "kind": "tune",
        "model": loaded.describe(),
        "data": {**_tasks_checksum(data, options.limit), **(data_checksum(own) if own else {})},
        "loss": options.target.kind if options.target.is_quality else "same_answers",
        "new_tokens": options.new_tokens,
        "scoring": options.scoring,
    }
    folder = ResultFolder(options.out, configuration)
    with folder.locked():
        found = _searched(loaded, prompts, options, folder.path / "measured.jsonl", tell)
        content = {**asdict(found.choice), "cell": found.choice.cell and found.choice.cell.label}
        write_json(folder.path / "choice.json", {"line": found.line, "sentence": found.sentence, "choice": content})
    return found


def _tasks_checksum(data: Any, limit: int | None) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        return {}
    return {"tasks": {name: data_identity(task) for name, task in data.items()}, "limit": limit}


def _searched(
    loaded: LoadedModel,
    prompts: Sequence[Prompt | TaskItem],
    options: TuneOptions,
    file: Path | None,
    tell: Callable[[str], None],
) -> Tuning:
    seconds = None if options.minutes is None else 60 * options.minutes
    trial = LiveTrial(loaded, prompts, options.target, options.new_tokens, file, seconds, options.scoring)
    cells = candidate_cells(loaded, options)
    choice = search(trial, cells, len(prompts), options.target, options.seed, tell)
    return described(choice, options.target, trial)


def candidate_cells(loaded: LoadedModel, options: TuneOptions) -> dict[str, list[Cell]]:
    """The cells that the model can give, by method."""
    wanted = list(options.methods) or [(name, {}) for name in method_names()]
    cells = [cell for cell in make_cells(wanted, options.keeps, options.seed) if cell.keep is not None]
    cells = equipped(cells, text_tower_of(loaded.source), loaded.processor)
    usable, _ = usable_cells(loaded.model, cells, wanted)
    grouped: dict[str, list[Cell]] = {}
    for cell in usable:
        grouped.setdefault(cell.title, []).append(cell)
    return grouped


def paste_line(cell: Cell) -> str:
    """The line of Python that applies a cell."""
    named = "".join(f", {name}={value!r}" for name, value in cell.parameters)
    return f'vlmprune.apply(model, "{cell.method}", keep={cell.keep}{named})'


class Timed(Protocol):
    """What can say how much faster a cell is."""

    def speed_up(self, cell: Cell) -> float:
        """Time to the first token of the unpruned model over the cell's."""


def described(choice: Choice, target: Target, trial: Timed) -> Tuning:
    """The choice in a line to paste and a sentence."""
    cut = " The time was used up before the search was through." if choice.out_of_time else ""
    if choice.cell is None:
        tried = f"on the {choice.searched} items of the search ({choice.tried} cells tried)"
        return Tuning(choice, "", f"Nothing that was tried meets {target.text} {tried}.{cut}")
    line = paste_line(replace(choice.cell, resources=()))
    low, high = choice.interval
    if target.kind == "kl":
        lost = f"a mean divergence of {choice.loss:.3g} nats (95 %: {max(low, 0):.2g} to {high:.2g})"
    elif target.kind == "accuracy_drop":
        lost = f"{100 * choice.loss:+.1f} points of accuracy lost (95 %: {100 * low:+.1f} to {100 * high:+.1f})"
    else:
        lost = f"{100 * (1 - choice.loss):.1f} % same answers (95 %: {100 * (1 - high):.0f} to {100 * min(1 - low, 1):.0f})"
    verdict = "meets" if choice.confirmed else "does not meet"
    sure = "" if choice.sure else ", though the interval reaches beyond it: more items would make it surer"
    where, met = f"On {choice.held_out} items held out", f"that {verdict} the target, {target.text}{sure}"
    if not choice.held_out:
        where, met = (
            "On the items of the search so far",
            f"there was no time to confirm it for the target, {target.text}",
        )
    speed = trial.speed_up(choice.cell) if target.kind == "ttft_speedup" else None
    fast = f", first token {speed:.2f} times as fast" if speed else ""
    return Tuning(
        choice,
        line,
        f"Saves {100 * (1 - choice.cost):.0f} % of the FLOPs to the first token{fast}. {where}: "
        f"{lost}; {met}. "
        f"{choice.searched} items searched, {choice.tried} cells tried.{cut}",
    )


def tune(
    model: Any,
    processor: Any,
    data: str | Path | Sequence[Prompt],
    *,
    same_answers: float | None = None,
    kl: float | None = None,
    accuracy_drop: float | None = None,
    kv_share: float | None = None,
    ttft_speedup: float | None = None,
    methods: Sequence[str] | None = None,
    keeps: Sequence[Keep] = KEEPS,
    limit: int | None = None,
    new_tokens: int = 32,
    minutes: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Tuning:
    """Find the cheapest method and budget that meet one target on your data; the model stays unpruned.

    Methods start at a middle budget on few items, the hopeless are dropped by paired statistics (successive halving), the
    budget is searched by bisection, and 30 % of the items, which the search never saw, confirm the choice.

    Args:
        model: the model, without a method.
        processor: its processor.
        data: a folder of pictures, a .jsonl file (see `vlmprune bench --data`), or prompts.
        same_answers: share of items that must get the same answer; 0.98 where no target is named.
        kl: mean divergence of the first token in nats that may not be exceeded.
        accuracy_drop: points of accuracy, as a share, that may be lost on items with answers.
        kv_share: share of the KV cache that may stay.
        ttft_speedup: how many times faster the first token must come, measured.
        methods: names to choose from; all that serve the model by default.
        keeps: budgets to choose from.
        limit: items to use.
        new_tokens: tokens generated for each.
        minutes: time after which the best so far is taken.
        out: folder for what is measured; the same call goes on from there.
        seed: of the order of items.

    Returns:
        The choice, a line to paste and a sentence.

    Raises:
        ParameterError: more than one target, or one that makes no sense; too few items.
        AlreadyAppliedError: the model carries a method.
    """
    named = {
        "same_answers": same_answers, "kl": kl, "accuracy_drop": accuracy_drop, "kv_share": kv_share,
        "ttft_speedup": ttft_speedup,
    }  # fmt: skip
    options = TuneOptions(
        target=one_target(named),
        methods=[(name, {}) for name in methods or ()],
        keeps=keeps,
        limit=limit,
        new_tokens=new_tokens,
        minutes=minutes,
        out=None if out is None else Path(out),
        seed=seed,
    )
    source = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    prompts = Path(data) if isinstance(data, (str, Path)) else data
    return tune_loaded(LoadedModel(model, processor, source), prompts, options)


def one_target(named: dict[str, float | None]) -> Target:
    """The one target that has a value; the default where none has.

    Raises:
        ParameterError: more than one has.
    """
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise ParameterError(f"{len(given)} targets are named: {', '.join(given)}; allowed: one.")
    for name, value in given.items():
        return Target(name, float(value))  # type: ignore[arg-type]
    return Target()
