"""The command line: a few verbs over recipes."""

from __future__ import annotations

import shlex
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hardmix import __version__
from hardmix.launcher import speaker, step_back, tell_launcher
from hardmix.terminal import (
    Verb,
    Verbs,
    console,
    many_bars,
    one_bar,
    print_comparison,
    print_lines,
    print_metrics,
    print_summary,
    say_where,
    telling_of,
)

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train with hard mixed samples, compare with intervals, and report on real data.",
    epilog="Start with [bold]hardmix demo[/bold]. `hardmix list` shows recipes and the names that they may use.",
)
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
SMOKE_FEW = ("train.batch_size=16", "semi.mu=2", "semi.steps_per_epoch=4")
SMOKE_PAIRS = ('eval.parts=["retrieval"]',)
SMOKE_CAPTIONS = ('eval.parts=["retrieval", "caption"]',)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, e.g. --set train.epochs=5. May be repeated."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to write into.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, max=10_000, help="Number of seeds (0, 1, ...) for each recipe.")]
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


@app.command(cls=Verb)
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
        say_where("What texts find, before and after", beside / names[-1] / "seed-0" / "report.html")


@app.command(cls=Verb)
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

    The run folder (default runs/NAME/seed-S, with --smoke runs/NAME-smoke/seed-S) holds recipe.toml, metrics.jsonl,
    summary.json, checkpoints, report.html.
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
        shortened = _shortened(load_recipe(str(recipe), sets), sets) if smoke else ()
        loaded = load_recipe(str(recipe), [*(sets or []), *shortened])
        loaded = loaded if seed is None else loaded.with_seed(seed)
        folder = out or Path("runs") / (loaded.name + "-smoke" * smoke) / f"seed-{loaded.seed}"
    if resume is None and rank_and_size()[0] == 0:
        _say_kept_starts([loaded])
    with one_bar(loaded.name) as tell:
        summary = run_recipe(loaded, folder, resume=resume is not None, progress=tell)
    if rank_and_size()[0] == 0:  # of several processes, one tells
        print_summary(summary)
        say_where("Report", folder / "report.html")


@app.command(cls=Verb)
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes; the others are tested against the first.")],
    seeds: Seeds = 5,
    out: Out = None,
    jobs: Jobs = 0,
    sets: Sets = None,
) -> None:
    """Train recipes on the same seeds; print means, 95 % intervals and paired tests against the first; write a report.

    One recipe alone gets its mean and interval, three or more are ranked by their mean.
    Finished runs in the output folder are kept, so the same command goes on where an interrupted one stopped.
    """
    _compare(recipes, seeds, out or Path("runs") / _folder_of(recipes), jobs, sets)


@app.command("eval", cls=Verb)
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a comparison with --robustness.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="last, best or a step number; default the recipe's choice.")
    ] = None,
    data_path: Annotated[str, typer.Option("--data-path", help="Where the data set is, if it has moved.")] = "",
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Also occluded, attacked, corrupted and mixed images, and calibration.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Images that --robustness changes; default 1500.")
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="Of an image-text run: retrieval, calibration, zeroshot, arithmetic, geometry, or caption; of one of "
            "several modalities: missing.",
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
        if task:
            raise ValueError("--task is for one measure and --robustness for others; leave out one of the two.")
        _evaluate_robustness(run_folder, checkpoint, data_path, samples)
        return
    if samples is not None:
        raise ValueError("--samples belongs to --robustness; add that or leave it out.")
    from hardmix.train.evaluate import chosen_checkpoint, evaluate_run

    _is_run(run_folder)
    checkpoint = checkpoint or chosen_checkpoint(run_folder)
    if task:
        from hardmix.train.pair_eval import pair_tables

        for heads, lines in pair_tables(run_folder, checkpoint, data_path, task):
            print_lines(heads, lines)
        return
    result = evaluate_run(run_folder, checkpoint, data_path)
    print_metrics(telling_of(result), f"{result['name']}, checkpoint of step {result['step']}", result.get("before"))


@app.command(cls=Verb)
def show(
    policy: Annotated[
        str | None, typer.Argument(help="A policy's name, e.g. cutmix; `hardmix list` shows them.")
    ] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="One sheet of every policy.")] = False,
    data: Annotated[str, typer.Option("--data", help="Data set to take images from.")] = "fashion-mini",
    data_path: Annotated[str, typer.Option("--data-path", help="Where the data set is.")] = "",
    run_folder: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="A trained run: its test images, and its model for policies to see."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="PNG file; default show-POLICY.png.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=32, help="Samples to draw.")] = 6,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Draws samples and mixing.")] = 0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the policy, e.g. alpha=0.2.")
    ] = None,
) -> None:
    """Draw a labelled picture of mixed samples: own, partner, mask, mix and weights."""
    from hardmix.train.errors import RecipeError
    from hardmix.train.show import show_all, show_policy

    if policy is not None and all_of_them:
        raise RecipeError(f"--all shows every policy, not {policy} alone; leave out one of the two.")
    if policy is None and not all_of_them:
        raise RecipeError("name a policy to show, or pass --all; `hardmix list` shows the policies.")
    if run_folder is not None:
        _is_run(run_folder)
    path = out or Path(f"show-{policy or 'all'}.png")
    if policy is None:
        if sets:
            raise RecipeError("--all shows every policy as it is; leave out --set.")
        console.print(", ".join(show_all(data, data_path, path, seed=seed, run=run_folder)))
    else:
        for line in show_policy(policy, data, data_path, path, rows=rows, seed=seed, sets=sets, run=run_folder):
            console.print(escape(line))
    say_where("Picture", path)


@app.command(cls=Verb)
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


@app.command("list", cls=Verb)
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
        "for several modalities, objectives": tables.MODALITY_OBJECTIVES,
        "for few labels, algorithms": tables.ALGORITHMS,
        "policies of pairs": tables.PAIR_POLICIES,
    }.items():
        console.print(f"\n[bold]{kind}[/bold]  {', '.join(names)}")


@app.command(cls=Verb)
def copy(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name.")],
    to: Annotated[Path | None, typer.Argument(help="TOML file to write; default NAME.toml here.")] = None,
) -> None:
    """Copy a shipped recipe to a file to edit, with every default written out."""
    from hardmix.train.errors import RecipeError
    from hardmix.train.files import new_file, write_text
    from hardmix.train.recipe import load_recipe

    resolved = load_recipe(recipe)
    path = to or Path(f"{resolved.name}.toml")
    if path.exists():
        raise RecipeError(f"{path} exists; choose another file, nothing was written.")
    with new_file(path):
        write_text(path, resolved.to_toml())
    say_where("Recipe", path)


@app.command(cls=Verb)
def report(folder: Annotated[Path, typer.Argument(help="A run or comparison folder.")]) -> None:
    """Write report.html of a run or a comparison again."""
    from hardmix.report.page import write_comparison_report, write_run_report

    if (folder / "comparison.json").is_file():
        page = write_comparison_report(folder)
    else:
        _is_run(folder)
        page = write_run_report(folder)
    say_where("Report", page)


def main() -> None:
    """Entry point: our own errors and warnings are one sentence each, anything else ends in a traceback."""
    shown, broken = warnings.showwarning, threading.excepthook
    warnings.showwarning, threading.excepthook = _tell_once(shown), _leave_to_main(broken)
    try:
        # Ctrl-C where nothing of ours hears it, and a verb that ends early, come back as a number.
        if code := app(standalone_mode=False):
            if code == 130:
                errors.print(f"[red]{speaker()}:[/red] stopped.")
            raise SystemExit(code)
    except typer.Abort:
        raise SystemExit(130) from None
    except Exception as error:
        if _lost_a_rank(error):
            told = str(error).splitlines()[0]
            errors.print(f"[red]{speaker()}:[/red] another process ended ({escape(told)}).", soft_wrap=True)
            step_back()
            raise SystemExit(3) from None
        if _out_of_memory(error):
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            errors.print(
                f"[red]{speaker()}:[/red] out of memory ({escape(told)}); make train.batch_size, eval.batch_size or "
                "data.image_size smaller, or train.accumulate larger.",
                soft_wrap=True,
            )
            raise SystemExit(3) from None
        code = _exit_code(error)
        if code is None:
            raise
        if message := _message(error):
            errors.print(f"[red]{speaker()}:[/red] {escape(message)}", soft_wrap=True)
            tell_launcher(message)
        raise SystemExit(code) from None
    finally:
        warnings.showwarning, threading.excepthook = shown, broken
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
            errors.print(f"[yellow]{speaker()}:[/yellow] {escape(str(message))}", soft_wrap=True)

    return tell


def _leave_to_main(shown: Callable[..., object]) -> Callable[..., None]:
    """What the system has against TensorBoard's thread is told by the run, which asks for it at its next line."""

    def tell(failure: threading.ExceptHookArgs) -> None:
        writes = type(failure.thread).__module__.startswith("tensorboard.")
        if not (writes and issubclass(failure.exc_type, OSError)):
            shown(failure)

    return tell


def _lost_a_rank(error: Exception) -> bool:
    if "hardmix.distributed" not in sys.modules:
        return False
    from hardmix.distributed import lost_a_rank

    return lost_a_rank(error)


def _out_of_memory(error: Exception) -> bool:
    """A GPU has a class for it, in torch, which not every verb loads; a CPU's allocator raises a plain RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


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


def _say_kept_starts(recipes: list[Any]) -> None:
    """What is not trained again has to be told: files that it was trained on may have changed."""
    from hardmix.train.start import kept_starts

    for folder, finished in kept_starts(recipes).items():
        say_where(f"Start, trained {time.strftime('%d %B %Y', time.localtime(finished))}", folder)


def _compare(names: list[str], seeds: int, out: Path, jobs: int, sets: list[str] | None, title: str = "") -> None:
    from hardmix.train.compare import compare as run_comparison
    from hardmix.train.recipe import load_recipe

    recipes = [load_recipe(name, sets) for name in names]
    _say_kept_starts(recipes)
    command = shlex.join(["hardmix", *sys.argv[1:]])
    labels = [f"{recipe.name} seed {seed}" for seed in range(seeds) for recipe in recipes]
    with many_bars(labels) as watch:
        result = run_comparison(
            recipes, list(range(seeds)), out, workers=jobs, command=command, title=title, watch=watch
        )
    print_comparison(result)
    say_where("Report", out / "report.html")


def _folder_of(recipes: list[str]) -> str:
    """compare-A-B; of many recipes the beginning, and what tells it from others that begin alike."""
    name = "compare-" + "-".join(map(_stem, recipes))
    return name if len(name) <= 100 else f"{name[:91]}-{zlib.crc32(name.encode()):08x}"


def _shortened(recipe: Any, sets: list[str] | None) -> tuple[str, ...]:
    """What --smoke sets in a recipe."""
    # A split file is of a whole set, its steps of an epoch are few all the same; many classes need more samples.
    given = recipe.semi.split or any(word.startswith("data.train_samples=") for word in sets or [])
    smoke = tuple(key for key in SMOKE if not (given and key.startswith("data.train_samples=")))
    staged = SMOKE_STAGES if recipe.contrast is not None and recipe.contrast.epochs else ()
    probed = SMOKE_PROBE if recipe.tune.probe_epochs else ()
    measured = SMOKE_CAPTIONS if recipe.model.name == "coca" else SMOKE_PAIRS
    of_task = {"image-text": measured, "few-labels": SMOKE_FEW}.get(recipe.task, ())
    return (*smoke, *staged, *probed, *of_task)


def _is_run(folder: Path) -> None:
    """A run folder, or one sentence that says what it is instead."""
    if (folder / "comparison.json").is_file():
        raise ValueError(f"{folder} is a comparison; name one of the runs in it, such as {folder}/NAME/seed-0.")
    if not (folder / "recipe.toml").is_file():
        raise FileNotFoundError(
            f"{folder} is no run folder (it holds no recipe.toml); name one that a run was written into."
        )


def _evaluate_robustness(folder: Path, checkpoint: str | None, data_path: str, samples: int | None) -> None:
    from hardmix.report.page import write_comparison_report, write_run_report
    from hardmix.train.evaluate import chosen_checkpoint
    from hardmix.train.robustness import SAMPLES, comparison_rows, robustness_of_comparison, robustness_of_run, rows

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    samples = samples or SAMPLES
    if (folder / "comparison.json").is_file():
        if checkpoint is not None:
            raise ValueError("a comparison is measured at the checkpoints of its recipes; leave out --checkpoint.")
        heads, lines = comparison_rows(robustness_of_comparison(folder, data_path, samples=samples))
        page = write_comparison_report(folder)
    else:
        _is_run(folder)
        checkpoint = checkpoint or chosen_checkpoint(folder)
        heads = ("measure", "over", "values")
        lines = rows(robustness_of_run(folder, checkpoint, data_path, samples=samples))
        page = write_run_report(folder)
    print_lines(heads, lines)
    say_where("Report", page)


def _stem(name: str) -> str:
    return Path(name).stem
