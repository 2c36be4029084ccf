"""The command line. Heavy imports happen inside commands, so that `--help` is quick."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import vlmprune

from .errors import VlmpruneError, missing_extra

USER_ERROR = 2
INTERRUPTED = 130
DEFAULT_METHODS = "random,uniform,pool,fastervlm,divprune"
METHODS_HELP = "Methods by comma, parameters as name:parameter=value; all: every method."
TEXT_TOWER_HELP = "Folder or hub name of the CLIP model of the vision tower, for methods that score by it."
ENGINES = ("vllm", "transformers")
KEEP_HELP = "Budgets by comma: shares (0.25) or counts (64)."

app = typer.Typer(
    name="vlmprune",
    help="Training-free visual token pruning and merging for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except VlmpruneError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        typer.echo(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; answered items are kept, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _require_extra(extra: str, *modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise missing_extra(extra, module)


def _check_methods(text: str) -> None:
    """Raise for an unknown method before anything heavy is imported."""
    from .method_files import check_names

    check_names(text, ("all", "lower_resolution"))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _batch_sizes(option: str, text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise typer.BadParameter(f"{option} {text!r}; allowed: whole numbers from 1, by comma.")
    return sizes


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmprune {vlmprune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def methods() -> None:
    """List the methods that can be named."""
    from dataclasses import fields

    from vlmprune.methods.registry import get_method, method_names

    width = max(map(len, method_names()))
    for name in method_names():
        cls = get_method(name)
        common = ("keep", "keep_positions")
        own = ", ".join(f"{field.name}={field.default!r}" for field in fields(cls) if field.name not in common)
        line = (cls.__doc__ or "").strip().splitlines()[0]
        typer.echo(f"{name:<{width}}  {line}{f' ({own})' if own else ''}")


@app.command(name="new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method: lower-case words joined by underscores.")],
    site: Annotated[str, typer.Option(help="Where it acts: input or layer.")] = "input",
    folder: Annotated[Path, typer.Option(help="Where the package's folder is made.")] = Path(),
) -> None:
    """Write a package with a method of your own to start from; `pip install -e` makes it known."""
    with _clear_errors():
        from vlmprune.new_method.scaffold import write_package

        for path in write_package(name, site, folder):
            typer.echo(path)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="Shipped model (tiny-llava), local folder or hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run goes on from it.")],
    methods: Annotated[
        str, typer.Option(help=f"{METHODS_HELP} lower_resolution: the unpruned model on smaller pictures.")
    ] = DEFAULT_METHODS,
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.5,0.25,0.1,0.05",
    tasks: Annotated[
        str,
        typer.Option(help="lmms-eval tasks, tags or groups by comma; all: the embedded ones, video: those on clips."),
    ] = "all",
    suite: Annotated[
        str | None,
        typer.Option(help="Instead of tasks: suites by comma, with a mean for each ability (image-core, ocr, ...)."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Instead of tasks: own pictures (folder) or prompts (.jsonl), with answers or compared with the unpruned model."
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(help="With --data that has answers: auto (choice or contains), exact, contains, choice or anls."),
    ] = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="With --data: tokens generated for each prompt.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random methods and of lmms-eval.")] = 0,
    baselines: Annotated[
        bool, typer.Option(help="Add random, uniform, pool and lower_resolution where they are not named.")
    ] = True,
    include_path: Annotated[list[str] | None, typer.Option(help="Folder with further lmms-eval task files.")] = None,
    text_tower: Annotated[str | None, typer.Option(help=TEXT_TOWER_HELP)] = None,
    timing_seconds: Annotated[
        float, typer.Option(min=0, help="Time spent on measuring latency; 0 leaves it out.")
    ] = 30.0,
    timing_batch_size: Annotated[str, typer.Option(help="Batch sizes by comma at which times are measured.")] = "1",
    random_seeds: Annotated[int, typer.Option(min=1, help="Seeds that random is run with.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, items and an estimate of the time, and write nothing.")
    ] = False,
) -> None:
    """Measure accuracy and cost of a model, unpruned and pruned, through lmms-eval."""
    with _clear_errors():
        _check_methods(methods)
        _require_extra("eval", "lmms_eval", "datasets", "accelerate", "matplotlib")
        from vlmprune.eval.run.cells import parse_keeps, parse_methods

        wanted, budgets = parse_methods(methods, smaller_pictures=True), parse_keeps(keep)
        from vlmprune.eval.accuracy.suites import find_suites

        suites = _names(suite or "")
        in_suites = [task for found in find_suites(suites) for task in found.tasks]
        from vlmprune.eval.bench import BenchOptions, run_bench, run_on_data

        run: Callable[..., object] = run_bench
        if data is not None:
            run = partial(run_on_data, data=data, new_tokens=new_tokens, scoring=score)
        if dry_run:
            from vlmprune.eval.dry_run import print_plan

            run = partial(print_plan, data=data, new_tokens=new_tokens)
        run(
            BenchOptions(
                model=model,
                methods=wanted,
                keeps=budgets,
                tasks=list(dict.fromkeys(in_suites)) or _names(tasks),
                suites=suites,
                out=out,
                limit=limit,
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                seed=seed,
                baselines=baselines,
                task_folders=include_path or (),
                text_tower=text_tower,
                timing_seconds=timing_seconds,
                timing_batch_sizes=_batch_sizes("--timing-batch-size", timing_batch_size),
                random_seeds=random_seeds,
            )
        )


@app.command()
def latency(
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = DEFAULT_METHODS,
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.5,0.25,0.1",
    model: Annotated[str | None, typer.Option(help="Shipped model, local folder or hub name.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Instead of --model: a true architecture with random weights (llava-1.5-7b, qwen2.5-vl-3b, ...)."
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Batch sizes by comma.")] = "1",
    image_size: Annotated[str, typer.Option(help="Sizes of the made-up picture by comma: 336 or 640x480.")] = "672",
    video_frames: Annotated[
        int, typer.Option(min=0, help="Frames of a made-up video of that size in the picture's place; 0: a picture.")
    ] = 0,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of the made-up prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 17,
    dtype: Annotated[str, typer.Option(help="auto (as stored, bfloat16 for random weights), float32, ...")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random methods.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time to spend on each batch and picture size (3 to 30 rounds).")
    ] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Folder for latency.json and latency.csv.")] = None,
) -> None:
    """Measure where the time of a request goes, and how far pruning is from the ideal speed-up."""
    with _clear_errors():
        if (model is None) == (random_weights is None):
            raise typer.BadParameter("Name one of --model and --random-weights.")
        sizes = _batch_sizes("--batch-size", batch_size)
        _check_methods(methods)
        from vlmprune.eval.run.cells import make_cells, parse_keeps, parse_methods, usable_cells

        wanted = parse_methods(methods)
        cells = make_cells(wanted, parse_keeps(keep), seed)
        from vlmprune.eval.models.loading import load_model
        from vlmprune.eval.models.random_weights import open_preset
        from vlmprune.eval.models.synthetic_request import parse_sizes
        from vlmprune.eval.speed.latency_command import LatencyOptions, run_latency

        images = parse_sizes(image_size)
        largest = max(images, key=prod)
        if random_weights is not None:
            need = sizes[-1], largest, text_tokens + new_tokens, video_frames
            loaded, processor = open_preset(random_weights, dtype, device, *need)
        else:
            opened = load_model(str(model), dtype, device, sizes[-1], largest, video_frames)
            loaded, processor = opened.model, opened.processor.image_processor
        cells, left_out = usable_cells(loaded, cells, wanted, "video" if video_frames else "image")
        for item in left_out:
            typer.echo(item.note, err=True)
        options = LatencyOptions(cells, sizes, images, text_tokens, new_tokens, seconds, out, video_frames)
        run_latency(loaded, str(model or random_weights), options, processor)


@app.command()
def show(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or clips; all in one prompt.")],
    model: Annotated[str, typer.Option(help="Shipped model (tiny-llava), local folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="What is asked about the pictures.")] = "Describe this image.",
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = DEFAULT_METHODS,
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.25",
    scores: Annotated[bool, typer.Option("--scores", help="Add what the methods ranked the tokens by.")] = False,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each answer.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random methods.")] = 0,
    out: Annotated[Path, typer.Option(help="File to write: .png, .svg, .pdf or .jpg.")] = Path("kept.png"),
) -> None:
    """Draw what methods keep of pictures, with the model's answers under them."""
    with _clear_errors():
        from vlmprune.eval.pictures.plot import require_pictures
        from vlmprune.eval.run.cells import make_cells, parse_keeps, parse_methods, usable_cells

        require_pictures()
        wanted, budgets = parse_methods(methods), parse_keeps(keep)
        from vlmprune.eval.models.loading import load_model
        from vlmprune.eval.pictures.show_command import ShowOptions, check_show, run_show

        options = ShowOptions(images, prompt, make_cells(wanted, budgets, seed), out, scores, new_tokens)
        check_show(options)
        loaded = load_model(model, dtype, device)
        cells, left_out = usable_cells(loaded.model, options.cells, wanted)
        for item in left_out:
            typer.echo(item.note, err=True)
        run_show(loaded, replace(options, cells=[cell for cell in cells if not cell.is_full]))
        typer.echo(f"wrote {out}")


@app.command(name="selection-cost")
def selection_cost(
    random_weights: Annotated[str, typer.Option(help="A true architecture with random weights.")] = "llava-1b",
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "all",
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.25",
    image_size: Annotated[str, typer.Option(help="Sizes of the made-up picture by comma: 336 or 640x480.")] = "336",
    video_frames: Annotated[
        int, typer.Option(min=0, help="Frames of a made-up video of that size in the picture's place; 0: a picture.")
    ] = 0,
    language_layers: Annotated[
        int,
        typer.Option(min=0, help="Layers of the language model that run, whose time stands for all; 0: all of them."),
    ] = 0,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of the made-up prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, ...")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds over all methods.")] = 5,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, on a machine that does other work.")
    ] = "wall",
    out: Annotated[Path | None, typer.Option(help="CSV file to which the lines are added.")] = None,
) -> None:
    """Measure what selecting costs, as a share of the prefill time (or, inside the tower, of its time) that dropping saves."""
    with _clear_errors():
        _check_methods(methods)
        from vlmprune.eval.run.cells import parse_keeps, parse_methods
        from vlmprune.eval.speed.rounds import CLOCKS
        from vlmprune.eval.speed.selection_command import open_request, prepare_cells, run_selection_cost

        if clock not in CLOCKS:
            from .errors import unknown

            raise unknown("--clock", clock, list(CLOCKS))
        wanted, budgets = parse_methods(methods), parse_keeps(keep)
        model, requests, depth = open_request(
            random_weights, dtype, device, image_size, text_tokens, video_frames, language_layers
        )
        shown: Literal["image", "video"] = "video" if video_frames else "image"
        cells, left_out, tower_model = prepare_cells(model, random_weights, wanted, budgets, shown)
        for item in left_out:
            typer.echo(item.note, err=True)
        run_selection_cost(
            model, requests, cells, rounds, out, random_weights, tower_model=tower_model, clock=clock, depth=depth
        )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[OPTIONS] [the engine's own flags]",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Shipped model (tiny-llava), local folder or hub name.")],
    engine: Annotated[str, typer.Option(help=f"Whose server it is: {' or '.join(ENGINES)}.")] = ENGINES[0],
    method: Annotated[
        str | None, typer.Option(help="Method, parameters as name:parameter=value; none: the model is not pruned.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Budget: a share (0.25) or a count (64); the method's own if none.")
    ] = None,
) -> None:
    """Serve a pruned model through an OpenAI-compatible server; every other flag is passed to the engine."""
    with _clear_errors():
        if engine not in ENGINES:
            from .errors import unknown

            raise unknown("--engine", engine, ENGINES)
        if keep is not None and method is None:
            raise typer.BadParameter("--keep needs --method, which says what is kept.")
        if method is not None:
            _check_methods(method)
        from vlmprune.eval.run.cells import one_cell

        cell = one_cell(method, keep)
        if engine == "vllm":
            _require_extra("vllm", "vllm")
            from vlmprune.serving.vllm_server import serve_vllm

            serve_vllm(model, cell, context.args)
        else:
            _require_extra("serve", "fastapi", "uvicorn", "openai", "prometheus_client", "accelerate")
            from vlmprune.serving.transformers_server import serve_transformers

            serve_transformers(model, cell, context.args)


@app.command()
def throughput(
    model: Annotated[
        str | None,
        typer.Option(
            help="Shipped model, local folder or hub name; with --url what requests call it, if /v1/models says not."
        ),
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(help="Instead of --model: a true architecture with random weights (llava-160m, ...).")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="Instead of starting servers: name=http://host:port of one that runs; several are compared."),
    ] = None,
    engine: Annotated[str, typer.Option(help=f"Whose servers are started: {' or '.join(ENGINES)}.")] = ENGINES[0],
    methods: Annotated[str, typer.Option(help=f"{METHODS_HELP} The unpruned model is always measured.")] = "divprune",
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.25",
    concurrency: Annotated[str, typer.Option(help="Numbers of clients at once, by comma.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Requests that each client sends, one after the other.")] = 4,
    image_size: Annotated[
        str, typer.Option(help="Sizes of the made-up pictures by comma, in turn: 336 or 640x480.")
    ] = "336",
    images: Annotated[int, typer.Option(min=0, help="Pictures a request.")] = 1,
    prompt: Annotated[str, typer.Option(help="What is asked about the pictures.")] = "Describe this image.",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 32,
    server_flags: Annotated[
        str, typer.Option(help="The engine's own flags for every server, as on a command line.")
    ] = "",
    extra_body: Annotated[str, typer.Option(help="JSON object: more fields for every request.")] = "{}",
    together: Annotated[
        bool, typer.Option("--together", help="Start all servers at once and give each load to all in turn.")
    ] = False,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests to every server before those that count.")] = 2,
    wait: Annotated[float, typer.Option(min=0, help="Seconds until a server must be ready.")] = 600.0,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds until a request is given up.")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Folder for throughput.json, .csv and .md.")] = None,
) -> None:
    """Load OpenAI-compatible servers with ever more clients: requests per second, TTFT, time between tokens."""
    with _clear_errors():
        _check_methods(methods)
        levels = _batch_sizes("--concurrency", concurrency)
        _require_extra("serve", "openai", "PIL")
        from vlmprune.eval.models.synthetic_request import parse_sizes
        from vlmprune.eval.throughput.command import ThroughputOptions, run_throughput
        from vlmprune.eval.throughput.prompts import Prompts, fixed_length, parse_extra
        from vlmprune.eval.throughput.settings import Server, open_servers, running_servers

        extra, sizes = parse_extra(extra_body), parse_sizes(image_size)
        opened: AbstractContextManager[list[Server]]
        if url:
            if random_weights is not None:
                raise typer.BadParameter("--random-weights is for servers that are started here, not for --url.")
            name, opened = model or "running servers", nullcontext(running_servers(url, model))
        else:
            if (model is None) == (random_weights is None):
                raise typer.BadParameter("Name one of --model, --random-weights and --url.")
            if engine not in ENGINES:
                from .errors import unknown

                raise unknown("--engine", engine, ENGINES)
            from vlmprune.eval.run.cells import make_cells, parse_keeps, parse_methods

            cells = make_cells(parse_methods(methods), parse_keeps(keep), 0)
            name = str(model or random_weights)
            opened = open_servers(model, random_weights, cells, engine, shlex.split(server_flags), wait)
            extra = {**fixed_length(engine, new_tokens), **extra}
        options = ThroughputOptions(
            Prompts(prompt, sizes, images, new_tokens, extra),
            levels,
            requests,
            warm_up,
            timeout,
            together or bool(url),
            out,
        )
        with opened as servers:
            run_throughput(servers, name, options)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Shipped model (tiny-llava), local folder or hub name.")],
    data: Annotated[Path, typer.Option(help="Your pictures (folder) or prompts (.jsonl), without labels.")],
    out: Annotated[Path, typer.Option(help="File for the weights, which hawk:head_weights=FILE takes.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts; all by default.")] = None,
    layers: Annotated[str, typer.Option(help="Where a head is taken out: first (layer), or all.")] = "first",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Measure how much a model needs each head of its first layer: the weights that `hawk` ranks with."""
    with _clear_errors():
        if layers not in ("first", "all"):
            from .errors import unknown

            raise unknown("--layers", layers, ("first", "all"))
        from vlmprune.eval.calibration.head_weights import run_calibration
        from vlmprune.eval.models.loading import load_model

        found = run_calibration(load_model(model, dtype, device), data, out, limit, layers)  # type: ignore[arg-type]
        order = sorted(range(len(found.head_weights)), key=lambda head: -found.head_weights[head])
        best = ", ".join(f"{head} ({found.head_weights[head]:.0%})" for head in order[:3])
        typer.echo(f"{len(order)} heads, the heaviest: {best}. Written to {out}")


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="Shipped model (tiny-llava), local folder or hub name.")],
    data: Annotated[
        Path | None, typer.Option(help="Your pictures (folder) or prompts (.jsonl), with answers or without.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead of --data: lmms-eval tasks by comma; all: the embedded ones.")
    ] = None,
    same_answers: Annotated[
        float | None, typer.Option(help="Share of items with the same answer (default 0.98).")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Mean divergence of the first token, in nats, at most.")] = None,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="Accuracy that may be lost, as a share; needs answers.")
    ] = None,
    kv_share: Annotated[
        float | None, typer.Option(help="Share of the KV cache that may stay; best answers win.")
    ] = None,
    ttft_speedup: Annotated[
        float | None, typer.Option(help="How much faster the first token must come, measured.")
    ] = None,
    methods: Annotated[str, typer.Option(help=METHODS_HELP)] = "all",
    keep: Annotated[str, typer.Option(help=KEEP_HELP)] = "0.5,0.35,0.25,0.18,0.12,0.08,0.05",
    limit: Annotated[int | None, typer.Option(min=1, help="Items (of each task); all by default.")] = None,
    include_path: Annotated[list[str] | None, typer.Option(help="Folder with further lmms-eval task files.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each item.")] = 32,
    score: Annotated[str, typer.Option(help="For answers: auto, exact, contains, choice or anls.")] = "auto",
    minutes: Annotated[float | None, typer.Option(min=0, help="Time after which the best so far is taken.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is measured; the same command goes on from it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of items and of random methods.")] = 0,
) -> None:
    """Find the cheapest method and budget that meet a target on your data, and print the line to paste."""
    with _clear_errors():
        if (data is None) == (tasks is None):
            raise typer.BadParameter("Name one of --data and --tasks.")
        _check_methods(methods)
        _require_extra("eval", "lmms_eval", "scipy")
        import time

        from vlmprune.eval.accuracy.answer_scores import check_scoring
        from vlmprune.eval.models.loading import load_model
        from vlmprune.eval.run.cells import parse_keeps, parse_methods
        from vlmprune.eval.tune.run import TuneOptions, one_target, tune_loaded

        check_scoring(score)
        named = {
            "same_answers": same_answers, "kl": kl, "accuracy_drop": accuracy_drop, "kv_share": kv_share,
            "ttft_speedup": ttft_speedup,
        }  # fmt: skip
        options = TuneOptions(
            one_target(named), parse_methods(methods), parse_keeps(keep), limit, new_tokens, minutes, out, seed, score
        )
        start = time.monotonic()

        def tell(text: str) -> None:
            spent = (time.monotonic() - start) / 60
            left = "" if minutes is None else f", {max(minutes - spent, 0):.1f} left at most"
            typer.echo(f"[{spent:.1f} min{left}] {text}", err=True)

        loaded = load_model(model, dtype, device)
        items: Any = data
        if tasks is not None:
            from vlmprune.eval.accuracy.task_index import find_tasks
            from vlmprune.eval.accuracy.task_scores import quiet_lmms_eval

            with quiet_lmms_eval():
                items = find_tasks(_names(tasks), loaded.model.config.model_type, include_path or ())
        found = tune_loaded(loaded, items, options, tell)
        if found.line:
            typer.echo(found.line)
        typer.echo(found.sentence)


@app.command(name="gpu-report")
def gpu_report(
    out: Annotated[Path, typer.Option(help="Folder for the report; steps that worked are not done again.")],
    preset: Annotated[
        str, typer.Option(help="A true architecture with random weights, whose latency is measured.")
    ] = "llava-1.5-7b",
    methods: Annotated[str, typer.Option(help="Methods by comma; all: every one that serves the preset.")] = "all",
    ops: Annotated[str, typer.Option(help="Kernels by comma; all by default.")] = "",
    image_size: Annotated[str, typer.Option(help="Size of the made-up picture: 336 or 640x480.")] = "336",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    kernel_seconds: Annotated[float, typer.Option(min=0, help="About how long each line of a kernel is timed.")] = 0.5,
    latency_seconds: Annotated[float, typer.Option(min=0, help="About how long five methods are timed.")] = 120.0,
) -> None:
    """Check and time every kernel and measure a whole model's latency on this machine, on one page; needs no hub."""
    with _clear_errors():
        if methods != "all":
            _check_methods(methods)
        from vlmprune.eval.gpu_report import GpuReportOptions, run_gpu_report

        named = () if methods == "all" else _names(methods)
        options = GpuReportOptions(out, preset, device, named, _names(ops), image_size, kernel_seconds, latency_seconds)
        outcomes = run_gpu_report(options, lambda text: typer.echo(text, err=True))
        failed = [outcome.step for outcome in outcomes if outcome.problem]
        typer.echo(
            f"{len(outcomes) - len(failed)} of {len(outcomes)} steps worked. Written to {out / 'gpu-report.html'}"
        )
        if failed:
            typer.echo(f"failed: {', '.join(failed)}; the same command tries them again", err=True)
            raise typer.Exit(1)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="Model whose published rows are run: llava-1.5-7b.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run goes on from it.")],
    methods: Annotated[str, typer.Option(help="Methods by comma; all that something is published of by default.")] = "",
    benchmarks: Annotated[str, typer.Option(help="Benchmarks by comma (GQA, POPE, ...); all by default.")] = "",
    model: Annotated[str | None, typer.Option(help="Folder or hub name; that of the table by default.")] = None,
    table: Annotated[Path | None, typer.Option(help="A table of your own, a file of the shipped ones' form.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    include_path: Annotated[list[str] | None, typer.Option(help="Folder with further lmms-eval task files.")] = None,
) -> None:
    """Run the rows that papers published for a model through lmms-eval, and print published beside measured."""
    with _clear_errors():
        _require_extra("eval", "lmms_eval", "datasets", "accelerate", "matplotlib", "scipy")
        from vlmprune.eval.published.tables import read_published

        published = read_published(name, table).chosen(_names(methods), _names(benchmarks))
        from vlmprune.eval.bench import BenchOptions
        from vlmprune.eval.published.reproduce import run_reproduce

        tasks = list(dict.fromkeys(benchmark.task for benchmark in published.benchmarks.values()))
        options = BenchOptions(
            model or published.model, [(row.cell.method, {}) for row in published.rows], [], tasks, out, limit,
            batch_size, dtype, device, baselines=False, task_folders=include_path or (), timing_seconds=0,
        )  # fmt: skip
        run_reproduce(published, options)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of bench and latency, or folders of such.")],
    out: Annotated[
        Path,
        typer.Option(
            help="What to write: a page (.html), a table of models (.md), LaTeX (.tex), a plot (.svg, .pdf, .png)."
        ),
    ] = Path("report.html"),
) -> None:
    """Put the results of several runs on one self-contained HTML page, in a Markdown or LaTeX table, or in plots."""
    with _clear_errors():
        from vlmprune.eval.reports.write import write

        for file in write(folders, out):
            typer.echo(f"Written to {file}")


def main() -> None:
    """Entry point of the `vlmprune` command."""
    sys.exit(app())
