"""The command line: a few verbs over recipes."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hardmix import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train with hard mixed samples, compare with intervals, and report on real data.",
    epilog="Start with [bold]hardmix demo[/bold]. `hardmix list` shows recipes and the names that they may use.",
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

#: what --smoke sets
SMOKE = (
    "data.train_samples=320",
    "train.epochs=1",
    "train.batch_size=64",
    "train.warmup_epochs=0",
    "train.log_every=1",
)
#: and for a recipe of two stages, one epoch each; of pictures with texts, the measure that takes least, and captions
SMOKE_STAGES = ("train.epochs=2", "contrast.epochs=1")
SMOKE_PROBE = ("train.epochs=2", "tune.probe_epochs=1")
SMOKE_PAIRS = ('eval.parts=["retrieval"]',)
SMOKE_CAPTIONS = ('eval.parts=["retrieval", "caption"]',)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, e.g. --set train.epochs=5. May be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write into.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds (0, 1, ...) for each recipe.")]
Jobs = Annotated[int, typer.Option("--jobs", min=0, help="Runs side by side; 0: one per core on a CPU, one on a GPU.")]


def _version(value: bool) -> None:
    if value:
        console.print(f"hardmix {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Out = None,
    seeds: Seeds = 3,
    jobs: Jobs = 0,
    sets: Sets = None,
) -> None:
    """Train none, Mixup, Mixup+DM, CutMix and CutMix+DM on real data that comes with the install; write a report.

    Then, unless --set changes the recipes, three ways to predict a number from a table, and an image-text model before
    and after it is tuned, plainly and with m2-Mix, with reports beside the first. Takes a few minutes on two cores.
    The same command goes on where an interrupted one stopped.
    """
    out = out or Path("runs/demo")
    names = ["demo-none", "demo-mixup", "demo-mixup-dm", "demo-cutmix", "demo-cutmix-dm"]
    _compare(names, seeds, out, jobs, sets, title="What Decoupled Mixup does to Mixup and CutMix")
    if not sets:
        names = ["diabetes-l1", "diabetes-c-mixup", "diabetes-supremix"]
        beside = out.with_name(f"{out.name}-numbers")
        _compare(names, seeds, beside, jobs, None, title="What mixing does to the prediction of a number")
        names = ["emoji-zero-shot", "emoji-clip", "emoji-m2mix"]
        beside = out.with_name(f"{out.name}-pairs")
        _compare(names, seeds, beside, jobs, None, title="What tuning does to a model of pictures and texts")
        _say_where("What texts find, before and after", beside / names[-1] / "seed-0" / "report.html")


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.")] = None,
    sets: Sets = None,
    out: Out = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the recipe's seed.")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with a run folder from its last checkpoint.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Shorten to seconds: does the whole path work?")] = False,
) -> None:
    """Train one recipe: `hardmix run fashion-cutmix-dm --set train.epochs=5`.

    The run folder (default runs/NAME/seed-S) holds recipe.toml, metrics.jsonl, summary.json, checkpoints, report.html.
    """
    from hardmix.distributed import rank_and_size
    from hardmix.train.errors import RecipeError
    from hardmix.train.loop import run_recipe
    from hardmix.train.recipe import load_recipe

    if (recipe is None) == (resume is None):
        raise RecipeError("pass either a recipe to start or --resume RUN to go on; `hardmix list` shows the recipes.")
    if resume is not None:
        if sets or out or smoke or seed is not None:
            raise RecipeError("--resume goes on with a run as it is; leave out --set, --seed, --smoke and --out.")
        _is_run(resume)
        loaded = load_recipe(str(resume / "recipe.toml"))
        folder = resume
    else:
        shortened = _shortened(load_recipe(str(recipe), sets)) if smoke else ()
        loaded = load_recipe(str(recipe), [*(sets or []), *shortened])
        loaded = loaded if seed is None else loaded.with_seed(seed)
        folder = out or Path("runs") / loaded.name / f"seed-{loaded.seed}"
    with _one_bar(loaded.name) as tell:
        summary = run_recipe(loaded, folder, resume=resume is not None, progress=tell)
    if rank_and_size()[0] == 0:  # of several processes, one tells
        _print_summary(summary)
        _say_where("Report", folder / "report.html")


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Two or more recipes; the first is the baseline.")],
    seeds: Seeds = 5,
    out: Out = None,
    jobs: Jobs = 0,
    sets: Sets = None,
) -> None:
    """Train recipes on the same seeds; print means, 95 % intervals and paired tests against the first; write a report.

    Finished runs in the output folder are kept, so the same command goes on where an interrupted one stopped.
    """
    _compare(recipes, seeds, out or Path("runs") / ("compare-" + "-".join(map(_stem, recipes)))[:100], jobs, sets)


@app.command("eval")
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a comparison with --robustness.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="last, best or a step number; default the recipe's choice.")
    ] = None,
    data_path: Annotated[str, typer.Option("--data-path", help="Where the data set is, if it has moved.")] = "",
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Also occluded, attacked, corrupted and mixed images, and calibration.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images that --robustness changes.")] = 1500,
    task: Annotated[
        str,
        typer.Option(
            "--task", help="Of an image-text run: retrieval, calibration, zeroshot, arithmetic, geometry, or caption."
        ),
    ] = "",
) -> None:
    """Measure a trained run on its test split again, from a checkpoint.

    With --task one measure of an image-text run in full, line by line.

    With --robustness the folder's report gets a section on occlusion, FGSM, corruptions, hard mixed samples over
    lambda, temperature scaling, and why the training accuracy of a mixed run is low. A comparison folder is measured
    run by run.
    """
    if robustness:
        _evaluate_robustness(run_folder, checkpoint, data_path, samples)
        return
    from hardmix.train.evaluate import evaluate_run

    _is_run(run_folder)
    checkpoint = checkpoint or _recipes_choice(run_folder)
    if task:
        from hardmix.train.pair_eval import pair_tables

        for heads, lines in pair_tables(run_folder, checkpoint, data_path, task):
            _print_lines(heads, lines)
        return
    result = evaluate_run(run_folder, checkpoint, data_path)
    _print_metrics(result["test"], f"{result['name']}, checkpoint of step {result['step']}")


@app.command()
def show(
    policy: Annotated[str, typer.Argument(help="A policy's name, e.g. cutmix; `hardmix list` shows them.")],
    data: Annotated[str, typer.Option("--data", help="Data set to take images from.")] = "fashion-mini",
    data_path: Annotated[str, typer.Option("--data-path", help="Where the data set is.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="PNG file; default show-POLICY.png.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=32, help="Samples to draw.")] = 6,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the policy, e.g. alpha=0.2.")
    ] = None,
) -> None:
    """Draw a labelled picture of mixed samples: own, partner, mask, mix and weights."""
    from hardmix.train.show import show_policy

    path = out or Path(f"show-{policy}.png")
    lines = show_policy(policy, data, data_path, path, rows=rows, seed=seed, sets=sets)
    for line in lines:
        console.print(escape(line))
    _say_where("Picture", path)


@app.command()
def data() -> None:
    """List the data sets: what each holds, where it was found or looked for, and the command that gets the rest."""
    from hardmix.data.catalog import survey
    from hardmix.data.number_sets import NUMBER_SETS, find_numbers
    from hardmix.data.pair_sets import PAIR_SETS

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "what", "train + test", "licence", "found"):
        table.add_column(column, overflow="fold")
    missing = []
    for place in survey():
        entry = place.entry
        count = f"{entry.train:,} + {entry.test:,}" if entry.train else ""
        found = "no" if place.path is None else f"[green]{escape(place.path)}[/green]"
        table.add_row(escape(entry.name), escape(entry.title), count, escape(entry.license), found)
        if place.path is None:
            missing.append((entry.name, entry.get, place.looked))
    table.add_section()
    for numbers in NUMBER_SETS.values():
        where = find_numbers(numbers.name)
        yours, count = not numbers.targets, f"{numbers.samples:,}" if numbers.samples else ""
        held = f"the installed package {numbers.package}" if numbers.find is None else str(where.path)
        found = f"[green]{escape(held)}[/green]" if where.path else "" if yours else "no"
        title = f"{numbers.title} ({numbers.kind})"
        table.add_row(escape(numbers.name), escape(title), count, escape(numbers.license), found)
        if where.path is None:
            missing.append((numbers.name, numbers.get, where.looked))
    table.add_section()
    for pairs in PAIR_SETS.values():
        count = f"{pairs.pictures:,}" if pairs.pictures else ""
        if pairs.yours:
            missing.append((pairs.name, pairs.get, ()))
        found = "" if pairs.yours else "[green]hardmix[/green]"
        if pairs.find is not None:
            where = pairs.find(None)
            found = "no" if where.path is None else f"[green]{escape(str(where.path))}[/green]"
            if where.path is None:
                missing.append((pairs.name, pairs.get, where.looked))
        table.add_row(escape(pairs.name), escape(pairs.title), count, escape(pairs.license), found)
    console.print(table)
    for name, get, looked in missing:
        console.print(f"\n[bold]{escape(name)}[/bold]: {escape(get)}", soft_wrap=True)
        if looked:
            console.print(f"  looked in {escape(', '.join(looked))}", soft_wrap=True)


@app.command("list")
def list_names() -> None:
    """Recipes that come with the package, and the names that a recipe may use."""
    from hardmix import tables
    from hardmix.data.catalog import CATALOG
    from hardmix.data.number_sets import NUMBER_SETS
    from hardmix.data.pair_sets import PAIR_SETS
    from hardmix.models.build import MODELS
    from hardmix.models.encoders import ENCODERS
    from hardmix.models.pair_build import PAIR_MODELS
    from hardmix.models.towers import TEXT_TOWERS
    from hardmix.train.recipe import read_toml, shipped

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe")
    table.add_column("about", overflow="fold")
    for name in shipped():
        table.add_row(name, escape(read_toml(name).get("about", "")))
    console.print(table)
    for kind, names in {
        "policies": tables.POLICIES,
        "objectives": tables.OBJECTIVES,
        "models": [*MODELS, "timm/NAME"],
        "data sets": CATALOG,
        "for regression, policies": tables.REGRESSION_POLICIES,
        "objectives of the head": tables.REGRESSION_OBJECTIVES,
        "contrasts": tables.CONTRASTS,
        "encoders": ENCODERS,
        "sets of numbers": NUMBER_SETS,
        "for pictures with texts, objectives": tables.PAIR_OBJECTIVES,
        "two-tower models": PAIR_MODELS,
        "text towers": TEXT_TOWERS,
        "sets of pictures with texts": PAIR_SETS,
    }.items():
        console.print(f"\n[bold]{kind}[/bold]  {', '.join(names)}")


@app.command()
def copy(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    to: Annotated[Path | None, typer.Argument(help="TOML file to write; default NAME.toml here.")] = None,
) -> None:
    """Copy a shipped recipe to a file to edit, with every default written out."""
    from hardmix.train.errors import RecipeError
    from hardmix.train.files import write_text
    from hardmix.train.recipe import load_recipe

    resolved = load_recipe(recipe)
    path = to or Path(f"{resolved.name}.toml")
    if path.exists():
        raise RecipeError(f"{path} exists; choose another file, nothing was written.")
    write_text(path, resolved.to_toml())
    _say_where("Recipe", path)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run or comparison folder.")]) -> None:
    """Write report.html of a run or a comparison again."""
    from hardmix.report.page import write_comparison_report, write_run_report

    write = write_comparison_report if (folder / "comparison.json").is_file() else write_run_report
    _say_where("Report", write(folder))


def main() -> None:
    """Entry point: our own errors and warnings are one sentence each, anything else ends in a traceback."""
    shown = warnings.showwarning
    warnings.showwarning = _tell_once(shown)
    try:
        app(standalone_mode=False)
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if message := _message(error):
            errors.print(f"[red]hardmix:[/red] {escape(message)}", soft_wrap=True)
        raise SystemExit(code) from None
    finally:
        warnings.showwarning = shown
        if "hardmix.distributed" in sys.modules:  # a launcher's ranks; a verb that never trained has not loaded torch
            from hardmix.distributed import leave

            leave()


def _tell_once(shown: Callable[..., None]) -> Callable[..., None]:
    """Our own warnings as one line, once for each place that gives them: batch after batch they differ in numbers."""
    told: set[tuple[str, int]] = set()
    package = str(Path(__file__).parent)

    def tell(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if not filename.startswith(package):
            shown(message, category, filename, lineno, *rest)
        elif (filename, lineno) not in told:
            told.add((filename, lineno))
            errors.print(f"[yellow]hardmix:[/yellow] {escape(str(message))}", soft_wrap=True)

    return tell


def _exit_code(error: Exception) -> int | None:
    """130 / 143 for an interrupted run, 3 for a run that broke, 2 for bad input, None for a bug of ours."""
    from hardmix.train.errors import CheckpointError, Interrupted, RunError

    if isinstance(error, Interrupted):
        return 128 + error.signum
    if isinstance(error, (RunError, CheckpointError)):
        return 3
    if hasattr(error, "exit_code"):  # click's own, with its usage line
        return int(error.exit_code)
    return 2 if isinstance(error, (ValueError, TypeError, OSError, ImportError)) else None


def _message(error: Exception) -> str:
    return error.format_message() if hasattr(error, "format_message") else str(error)


def _compare(names: list[str], seeds: int, out: Path, jobs: int, sets: list[str] | None, title: str = "") -> None:
    from hardmix.train.compare import compare as run_comparison
    from hardmix.train.recipe import load_recipe

    recipes = [load_recipe(name, sets) for name in names]
    command = shlex.join(["hardmix", *sys.argv[1:]])
    labels = [f"{recipe.name} seed {seed}" for seed in range(seeds) for recipe in recipes]
    with _many_bars(labels) as watch:
        result = run_comparison(
            recipes, list(range(seeds)), out, workers=jobs, command=command, title=title, watch=watch
        )
    _print_comparison(result)
    _say_where("Report", out / "report.html")


def _shortened(recipe: Any) -> tuple[str, ...]:
    """What --smoke sets in a recipe."""
    staged = SMOKE_STAGES if recipe.contrast is not None and recipe.contrast.epochs else ()
    probed = SMOKE_PROBE if recipe.tune.probe_epochs else ()
    measured = SMOKE_CAPTIONS if recipe.model.name == "coca" else SMOKE_PAIRS
    return (*SMOKE, *staged, *probed, *(measured if recipe.task == "image-text" else ()))


def _is_run(folder: Path) -> None:
    """A run folder, or one sentence that says what it is instead."""
    if (folder / "comparison.json").is_file():
        raise ValueError(f"{folder} is a comparison; name one of the runs in it, such as {folder}/NAME/seed-0.")
    if not (folder / "recipe.toml").is_file():
        raise FileNotFoundError(f"{folder} is no run folder (it holds no recipe.toml); name the folder of a run.")


def _recipes_choice(folder: Path) -> str:
    from hardmix.train.recipe import load_recipe

    return load_recipe(str(folder / "recipe.toml")).eval.checkpoint


def _evaluate_robustness(folder: Path, checkpoint: str | None, data_path: str, samples: int) -> None:
    from hardmix.report.page import write_comparison_report, write_run_report
    from hardmix.train.robustness import comparison_rows, robustness_of_comparison, robustness_of_run, rows

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    if (folder / "comparison.json").is_file():
        if checkpoint is not None:
            raise ValueError("a comparison is measured at the last checkpoints; leave out --checkpoint.")
        heads, lines = comparison_rows(robustness_of_comparison(folder, data_path, samples=samples))
        page = write_comparison_report(folder)
    else:
        _is_run(folder)
        checkpoint = checkpoint or _recipes_choice(folder)
        heads = ("measure", "over", "values")
        lines = rows(robustness_of_run(folder, checkpoint, data_path, samples=samples))
        page = write_run_report(folder)
    _print_lines(heads, lines)
    _say_where("Report", page)


def _print_lines(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for line in lines:
        table.add_row(*map(escape, line))
    # Values stand below what they are measured at; a narrow terminal may wrap the line, but not the cells.
    Console(highlight=False, width=max(console.width, 140)).print(table)


def _stem(name: str) -> str:
    return Path(name).stem


def _say_where(what: str, path: Path) -> None:
    console.print(f"{what}: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


def _columns() -> list[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


def _note(event: dict[str, Any]) -> str:
    """'loss 0.123 acc 0.850 4,000 samples/s', of what the task logs."""
    losses = [f"{name} {event[name]:.3f}" for name in ("loss", "contrast") if name in event]
    accuracy = [f"acc {event['accuracy']:.3f}"] if "accuracy" in event else []
    return " ".join([*losses, *accuracy, f"{event['images_per_s']:,.0f} samples/s"])


@contextmanager
def _one_bar(name: str) -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(*_columns(), console=console) as bar:
        task = bar.add_task(escape(name), total=None, note="")

        def tell(event: dict[str, Any]) -> None:
            note = f"epoch {event['epoch']}/{event['epochs']} {_note(event)}"
            bar.update(task, total=event["steps"], completed=event["step"], note=note)

        yield tell


@contextmanager
def _many_bars(labels: list[str]) -> Iterator[Any]:
    """One bar for all runs, one for each run that is going on."""
    from rich.progress import Progress

    with Progress(*_columns(), console=console) as bar:
        # In hundredths of a run, so that the time left is known long before the first run ends.
        share = dict.fromkeys(range(len(labels)), 0.0)
        whole = bar.add_task("[bold]all runs[/bold]", total=100 * len(labels), note="")
        open_bars: dict[int, Any] = {}

        def watch(number: int, event: dict[str, Any]) -> None:
            if event.get("done"):
                share[number] = 100.0
                if number in open_bars:
                    bar.remove_task(open_bars.pop(number))
            else:
                if number not in open_bars:
                    open_bars[number] = bar.add_task(escape(labels[number]), total=event["steps"], note="")
                bar.update(open_bars[number], completed=event["step"], note=_note(event))
                share[number] = 100.0 * event["step"] / event["steps"]
            done = sum(value == 100.0 for value in share.values())
            bar.update(whole, completed=int(sum(share.values())), note=f"{done} of {len(labels)} done")

        yield watch


def _print_summary(summary: dict[str, Any]) -> None:
    _print_metrics(
        summary["test"],
        f"{summary['name']}, seed {summary['seed']}, {summary['data']['test']:,} test "
        + summary["data"].get("kind", "images"),
        summary.get("before"),
    )


#: what the tables call a metric; rates are shown in per cent
TITLES = {
    "top1": "top-1 %", "top5": "top-5 %", "nll": "NLL", "ece": "ECE %", "mixup_both": "both in Mixup %",
    "cutmix_both": "both in CutMix %", "mae": "MAE", "rmse": "RMSE", "gm": "GM", "r2": "R2", "pearson": "Pearson",
    "spearman": "Spearman", "ordinality": "ordinality", "local_linearity": "non-linearity",
    "recall_1": "R@1 %", "recall_5": "R@5 %", "recall_10": "R@10 %", "median_rank": "rank",
    "shift_recall_1": "shift R@1 %", "shift_recall_5": "shift R@5 %", "shift_ece": "shift ECE %",
    "seen_shift_recall_5": "seen, shift R@5 %", "zeroshot": "zero-shot %", "shift_zeroshot": "shift zero-shot %",
    "fewshot_4": "4-shot %", "shift_fewshot_4": "shift 4-shot %", "arithmetic": "arithmetic %", "gap": "gap",
    "caption_exact": "caption exact %", "caption_edit_distance": "caption edits", "caption_bleu_4": "BLEU-4 %",
    "caption_cider": "CIDEr", "shift_caption_exact": "shift caption exact %",
    "shift_caption_edit_distance": "shift caption edits", "shift_caption_bleu_4": "shift BLEU-4 %",
    "shift_caption_cider": "shift CIDEr",
}  # fmt: skip


#: what a terminal has no room for in a comparison
IN_THE_REPORT = (
    *("top5", "gm", "pearson", "local_linearity", "recall_10", "median_rank", "shift_recall_1"),
    *("seen_shift_recall_5", "shift_zeroshot", "shift_fewshot_4", "gap"),
    *("caption_bleu_4", "shift_caption_exact", "shift_caption_bleu_4", "shift_caption_cider"),
    "shift_caption_edit_distance",
)


#: metrics that fit side by side on a narrow terminal
MOST_COLUMNS = 10


def _print_metrics(test: dict[str, Any], title: str, before: dict[str, Any] | None = None) -> None:
    """Up to a handful of metrics side by side; more one below the other, with what they were before where known."""
    shown = [key for key in TITLES if key in test]
    if len(shown) <= MOST_COLUMNS:
        table = Table(title=escape(title), box=None, pad_edge=False, header_style="bold", title_justify="left")
        for key in shown:
            table.add_column(TITLES[key], justify="right")
        table.add_row(*(_number(test[key], key) for key in shown))
        console.print(table)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("before", "after") if before else ("test",):
        table.add_column(name, justify="right")
    for key in shown:
        values = ([_number(before.get(key), key)] if before else []) + [_number(test[key], key)]
        table.add_row(TITLES[key], *values)
    console.print(escape(title))
    console.print(table)


def _print_comparison(result: dict[str, Any]) -> None:
    """Means with 95 % intervals, then the paired difference of top-1 against the first recipe."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", overflow="fold")
    shown = [metric for metric in result["metrics"] if metric in TITLES and metric not in IN_THE_REPORT]
    for metric in shown:
        table.add_column(TITLES[metric], justify="right")
    for row in result["table"]:
        table.add_row(escape(row["name"]), *(_with_interval(row["metrics"][metric], metric) for metric in shown))
    console.print(table)
    seeds = len(result["seeds"])
    if seeds == 1:
        console.print("One seed: no intervals and no test; pass --seeds 5 or more.")
        return
    console.print(f"Mean over {seeds} seeds with 95 % interval.")
    key = result["metrics"][0]
    title = TITLES[key].removesuffix(" %").capitalize() if TITLES[key].endswith("%") else TITLES[key]
    console.print(f"{title} against {escape(result['table'][0]['name'])}, paired by seed; p (with Holm's correction):")
    _print_tests([(row["name"], row["versus_first"][key]) for row in result["table"][1:]], key)
    told = {key: title, "cutmix_both": "Both classes of half-and-half CutMix images"}
    for metric, title in told.items() if result["twins"] else ():
        if metric in result["metrics"]:
            console.print(f"{title}, same policy with another objective:")
            tests = [(f"{t['name']} against {t['base']}", t["tests"][metric]) for t in result["twins"]]
            _print_tests(tests, metric)


def _print_tests(tests: list[tuple[str, dict[str, Any]]], metric: str) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    factor, unit = (100, " points") if TITLES[metric].endswith("%") else (1, "")
    for name, test in tests:
        if test["p"] is None:  # a measure that is not defined for one of them, such as a correlation of constants
            table.add_row(f"  {escape(name)}", "n/a", "", "")
            continue
        difference = f"{factor * test['difference']:+.2f}{unit}"
        interval = f"[{factor * test['low']:+.2f}, {factor * test['high']:+.2f}]"
        table.add_row(f"  {escape(name)}", difference, escape(interval), f"p = {test['p']:.3f} ({test['p_holm']:.3f})")
    console.print(table)


def _number(value: float | None, metric: str) -> str:
    if value is None or value != value:
        return "n/a"
    return f"{100 * value:.2f}" if TITLES[metric].endswith("%") else f"{value:.3f}"


def _with_interval(value: dict[str, Any], metric: str) -> str:
    mean = value["mean"]
    if value["low"] is None:
        return _number(mean, metric)
    return f"{_number(mean, metric)} ±{_number((value['high'] - value['low']) / 2, metric)}"
