"""The command line. Parsing and printing only; everything heavy is imported inside the commands."""

import shlex
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import galdist

if TYPE_CHECKING:
    from galdist.plan import PlannedStep

app = typer.Typer(
    help=galdist.__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_LINES = 100  # of the tables at the end of a run
_SAMPLES = 4  # columns at most in a table of results


def main() -> None:
    """Entry point: errors of the user end with status 2, of a step with 1, without a traceback."""
    from hpc.strict import SettingsError

    try:
        app()
    except SettingsError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has gone: nothing is left to say, and nobody to say it to
        sys.exit(141)
    except OSError as error:
        if error.errno is None:
            raise
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    print(f"galdist: {message}", file=sys.stderr)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"galdist {galdist.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn how galaxies populate dark matter, and check it with the statistics that surveys measure."""


def _experiment_names(incomplete: str) -> list[str]:
    from galdist.config import experiments

    return [name for name in experiments() if name.startswith(incomplete)]


Source = Annotated[
    str,
    typer.Argument(
        metavar="FILE|NAME",
        help="A run file (YAML), or the name of an experiment that ships with galdist (see: galdist list).",
        autocompletion=_experiment_names,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value: seed=2, STEP.KEY=VALUE, STEP.resources.ranks=4. Repeatable.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, for example runs/quickstart.")]


@app.command()
def run(
    source: Source,
    sets: Sets = None,
    site: Annotated[
        str, typer.Option(help="Machine: local, debug (one process, for debuggers), or a site's YAML file.")
    ] = "local",
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="STEP", help="Compute this step and all that depends on it again."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STEP", help="Do this step alone; what it reads must be done.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what would be reused; do nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder. Default: runs/NAME.")
    ] = None,
) -> None:
    """Run the steps of a run file; what is done already is kept.

    Stopped or killed at any moment, the same command continues.
    """
    from galdist import config, display, pipeline
    from galdist.plan import plan
    from galdist.status import reports, results
    from hpc.site import load_site

    checked = config.load(source, tuple(sets or ()))
    machine = load_site(site)
    folder = out or Path("runs") / checked.file.name
    steps = plan(checked, folder, start_from, only)
    if dry_run:
        _print_plan(steps, folder, machine.cores)
        return
    waiting = sum(step.runs for step in steps)
    count = f"{waiting} of {len(steps)} steps to do"
    print(f"galdist {galdist.__version__}: {checked.file.name} in {folder}: {count}")
    again = _again(source, sets, site, only, out)
    try:
        with display.for_stream() as shown:
            pipeline.execute(checked, folder, machine, shown.show, start_from, only)
    except pipeline.RunLocked as error:
        _fail(str(error), 2)
    except pipeline.StepFailed as error:
        _fail(f"{error}\n\nOnce mended, continue with: {again}", 1)
    except pipeline.Interrupted as error:
        _fail(f"{error}. What is done is kept. Continue with: {again}", error.exit_code)
    _print_results(results(folder), _LINES, f"all of them: galdist show {folder}")
    for report in reports(folder):
        print(f"report: {report.absolute()}")


def _again(source: str, sets: list[str] | None, site: str, only: str | None, out: Path | None) -> str:
    """The command that continues a run: without ``--from``, which would begin again."""
    words = ["galdist", "run", source]
    for entry in sets or []:
        words += ["--set", entry]
    words += ["--site", site] if site != "local" else []
    words += ["--only", only] if only else []
    words += ["--out", str(out)] if out else []
    return shlex.join(words)


@app.command("list")
def list_all() -> None:
    """List the experiments that ship, the stages and the models."""
    import yaml

    from galdist import models
    from galdist.config import experiments
    from galdist.stages import STAGES

    rows = [
        [name, str(yaml.safe_load(path.read_text(encoding="utf-8")).get("description", ""))]
        for name, path in experiments().items()
    ]
    _table("Experiments (galdist run NAME)", ["name", "what it does"], rows)
    _table(
        "Stages (in run files)",
        ["stage", "runtime", "ranks", "reads"],
        [
            [name, stage.runtime, str(stage.ranks), ", ".join(stage.reads) or "-"]
            for name, stage in STAGES.items()
        ],
    )
    _table("Models (of the train stage)", ["model", "class"], [list(row) for row in models.MODELS.items()])


@app.command()
def status(folder: Folder) -> None:
    """Show the steps of a run: states, times, sizes, memory."""
    from galdist.status import duration, holder, size_text, steps_of

    steps = steps_of(folder)
    who = holder(folder)
    print(f"{folder}: " + (f"in use by {who}" if who else "nobody works here"))
    _table(
        "",
        ["step", "stage", "state", "time", "size", "peak memory", ""],
        [
            [
                step.name,
                step.stage,
                step.state,
                duration(step.seconds) if step.seconds else "",
                size_text(step.bytes) if step.bytes else "",
                size_text(step.peak_memory) if step.peak_memory else "",
                step.detail,
            ]
            for step in steps
        ],
    )


@app.command()
def show(folder: Folder) -> None:
    """Show the results of a run."""
    from galdist.status import reports, results, steps_of

    steps_of(folder)  # says so where there is no run
    _print_results(results(folder), None, "")
    for report in reports(folder):
        print(f"report: {report.absolute()}")


@app.command("config")
def show_config(source: Source, sets: Sets = None) -> None:
    """Check a run file and print it with every default written out."""
    from galdist import config

    print(config.load(source, tuple(sets or ())).to_yaml(), end="")


def _print_plan(steps: "list[PlannedStep]", folder: Path, cores: int) -> None:
    from galdist.status import duration

    rows = []
    for entry in steps:
        asked = entry.step.resources.model_dump(exclude_none=True, exclude={"ranks"})
        resources = ", ".join(f"{key} {value}" for key, value in asked.items())
        time = "" if entry.expected is None or not entry.runs else duration(entry.expected)
        rows.append(
            [
                entry.name,
                entry.step.stage,
                "run" if entry.runs else "keep",
                entry.why,
                f"{entry.stage.runtime} x {entry.ranks}",
                resources,
                time if entry.measured or not time else f"~{time}",
            ]
        )
    _table(
        f"Plan of {folder} ({cores} cores)", ["step", "stage", "", "why", "ranks", "asks for", "time"], rows
    )
    waiting = [entry for entry in steps if entry.runs]
    known = [entry.expected for entry in waiting if entry.expected is not None]
    about = f", about {duration(sum(known))}" if waiting and len(known) == len(waiting) else ""
    print(f"{len(waiting)} of {len(steps)} steps would run{about}. Nothing was changed.")


def _print_results(rows: list[dict[str, Any]], limit: int | None, more: str) -> None:
    """A table a step: a line a metric with a column a sample; with many samples, a line a value."""
    if not rows:
        print("no results yet")
        return
    left = len(rows) if limit is None else limit
    for step, group in groupby(rows, key=itemgetter("step")):
        found = list(group)
        samples = list(dict.fromkeys(row["sample"] for row in found))
        cells: dict[tuple[str, ...], list[str]] = {}
        for row in found:
            error = "" if row["error"] is None else f" ± {row['error']:.2g}"
            value = f"{row['value']:.4g}{error}"
            if len(samples) <= _SAMPLES:
                line = cells.setdefault((row["metric"],), [row["metric"], *[""] * len(samples), row["unit"]])
                line[1 + samples.index(row["sample"])] = value
            else:
                cells[row["metric"], row["sample"]] = [row["metric"], row["sample"], value, row["unit"]]
        columns = samples if len(samples) <= _SAMPLES else ["sample", "value"]
        lines = list(cells.values())
        if lines[:left]:
            _table(f"Results of {step}", ["metric", *columns, "unit"], lines[:left])
        left = max(0, left - len(lines))
    if left == 0 and limit is not None:
        print(f"... and more; {more}")


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print columns: by rich on a terminal, as plain text (no line is cut) elsewhere."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, title=title or None, title_justify="left", box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(line[n]) for line in [header, *rows]) for n in range(len(header))]
    if title:
        print(title)
    for line in [header, *rows]:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
