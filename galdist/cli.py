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
    from galdist.config import Run
    from galdist.plan import PlannedStep
    from hpc.site import Site

app = typer.Typer(
    help=galdist.__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_LINES = 100  # of the tables at the end of a run
_SAMPLES = 4  # columns at most in a table of results
_GLANCE = 1.0  # seconds between looks at a run that is watched
_SITE = "GALDIST_SITE"


def main() -> None:
    """Entry point: errors of the user end with status 2, of a step with 1, without a traceback."""
    from hpc.slurm import SlurmError
    from hpc.strict import SettingsError

    try:
        app()
    except SettingsError as error:
        _fail(str(error), 2)
    except SlurmError as error:
        _fail(str(error), 1)
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
Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        help="A run's folder, such as runs/quickstart. Default: the run in runs/ that was worked on last.",
        show_default=False,
    ),
]


@app.command()
def run(
    source: Source,
    sets: Sets = None,
    site: Annotated[
        str,
        typer.Option(
            envvar=_SITE, help="Machine: local, debug (one process, for debuggers), or a site's YAML file."
        ),
    ] = "local",
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="STEP", help="Compute this step and all that depends on it again."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="Do this step alone; what it reads must be done, or asked for too. Repeatable.",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Do the steps of this stage, like --only. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what would be reused; do nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder. Default: runs/NAME.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Queue a Slurm job that does this, and return.")
    ] = False,
    in_allocation: Annotated[
        bool, typer.Option("--in-allocation", help="Use the nodes of the Slurm job that this is in.")
    ] = False,
) -> None:
    """Run the steps of a run file; what is done already is kept.

    Stopped or killed at any moment, the same command continues.
    """
    from galdist import config, display, pipeline
    from galdist.plan import plan
    from galdist.status import reports, results

    checked = config.load(source, tuple(sets or ()))
    machine = _machine(site, in_allocation, detach)
    folder = out or Path("runs") / checked.file.name
    chosen = _chosen(checked, only or [], stage or [])
    steps = plan(checked, folder, start_from, chosen)
    pipeline.check_site(steps, machine)
    if dry_run:
        _print_plan(steps, folder, machine)
        return
    waiting = sum(step.runs for step in steps)
    count = f"{waiting} of {len(steps)} steps to do"
    print(f"galdist {galdist.__version__}: {checked.file.name} in {folder}: {count}")
    words = ["run", source]
    for option, values in (("--set", sets), ("--only", only), ("--stage", stage)):
        words += [word for value in values or () for word in (option, value)]
    words += ["--site", site] if site != "local" else []
    words += ["--in-allocation"] if in_allocation else []
    words += ["--out", str(out)] if out else []
    if detach and waiting:
        _detach(checked, folder, steps, machine, words, start_from)
        return
    again = shlex.join(["galdist", *words])  # without --from, which would begin again
    try:
        with display.for_stream() as shown:
            pipeline.execute(checked, folder, machine, shown.show, start_from, chosen)
    except pipeline.RunLocked as error:
        _fail(str(error), 2)
    except pipeline.StepFailed as error:
        _fail(f"{error}\n\nOnce mended, continue with: {again}", 1)
    except pipeline.Interrupted as error:
        how = "" if error.requeued else f" Continue with: {again}"
        _fail(f"{error}. What is done is kept.{how}", error.exit_code)
    _print_results(results(folder), _LINES, f"all of them: galdist show {folder}")
    for report in reports(folder):
        print(f"report: {report.absolute()}")


def _machine(site: str, in_allocation: bool, detach: bool) -> "Site":
    """The site that a run is to use."""
    from hpc.site import load_site
    from hpc.slurm import own_job
    from hpc.strict import Problem, SettingsError

    machine = load_site(site)
    if in_allocation and detach:
        text = "one or the other: --detach gives every step a job, --in-allocation is for a job that is here"
        raise SettingsError("--detach, --in-allocation", [Problem((), text)])
    if (in_allocation or machine.launcher == "allocation") and own_job() is None:
        text = (
            "this is not inside a Slurm job (SLURM_JOB_ID is not set). It is for batch scripts: "
            "sbatch slurm/train.sbatch FILE. Without it and with a Slurm --site, each step becomes a job"
        )
        raise SettingsError("--in-allocation", [Problem((), text)])
    if detach and machine.launcher != "slurm":
        text = (
            f"needs a cluster, and --site {site} is this machine: name a site file with launcher: slurm "
            f"(--site slurm/sites/X.yaml, or {_SITE}); here, use nohup galdist run ... &"
        )
        raise SettingsError("--detach", [Problem((), text)])
    return machine.in_allocation() if in_allocation else machine


def _chosen(run: "Run", only: list[str], stages: list[str]) -> list[str] | None:
    """The steps that ``--only`` and ``--stage`` name; None for all."""
    from galdist.stages import STAGES
    from hpc.strict import Problem, SettingsError, nearest

    if not only and not stages:
        return None
    there = {step.stage for step in run.file.steps}
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        problems = [Problem((), f"there is no stage {name!r}{nearest(name, STAGES)}") for name in unknown]
        raise SettingsError("--stage", problems)
    if stages and there.isdisjoint(stages):
        text = f"no step of this run has stage {' or '.join(stages)}; its stages: {', '.join(sorted(there))}"
        raise SettingsError("--stage", [Problem((), text)])
    return [*only, *(step.name for step in run.file.steps if step.stage in stages)]


def _detach(
    run: "Run",
    folder: Path,
    steps: "list[PlannedStep]",
    site: "Site",
    words: list[str],
    start_from: str | None,
) -> None:
    """Queue the command that this process was started with, and say how to follow it."""
    from galdist import control

    name = shlex.quote(str(folder))
    ways = (
        f"  watch:   galdist watch {name}\n"
        f"  logs:    galdist logs -f --run {name} orchestrator    (or a step)\n"
        f"  cancel:  galdist cancel {name}"
    )
    if who := control.worker(folder):
        _fail(f"{folder} is in use by {who}\n{ways}", 2)
    program = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    again = [*program, *words]
    command = [*again, "--from", start_from] if start_from else again
    id = control.queue(run, folder, steps, site, command, again)
    print(f"queued as job {id}, which starts the steps; you may log out\n{ways}")


@app.command()
def status(folder: Folder = None) -> None:
    """Show the steps of a run: states, jobs, times, sizes, memory."""
    from galdist.control import worker
    from galdist.display import nodes_text
    from galdist.status import duration, on_cluster, size_text, steps_of

    folder = _run_of(folder)
    steps = steps_of(folder)
    who = worker(folder)
    print(f"{folder}: " + (f"in use by {who}" if who else "nobody works here"))
    jobs = {step.name: step.job for step in steps if step.job and on_cluster(step.job)}
    where = [(job.id, nodes_text(job)) if (job := jobs.get(step.name)) else ("", "") for step in steps]
    _table(
        "",
        ["step", "stage", "state", *(["job", "node"] if jobs else []), "time", "size", "peak memory", ""],
        [
            [
                step.name,
                step.stage,
                step.state,
                *(place if jobs else []),
                duration(step.seconds) if step.seconds else "",
                size_text(step.bytes) if step.bytes else "",
                size_text(step.peak_memory) if step.peak_memory else "",
                step.detail,
            ]
            for step, place in zip(steps, where, strict=True)
        ],
    )


@app.command()
def watch(
    folder: Folder = None,
    once: Annotated[bool, typer.Option("--once", help="Print the run as it is now, and return.")] = False,
) -> None:
    """Watch a run: steps, jobs, nodes, progress, time left, dashboards.

    Ctrl-C ends the watching only.
    """
    import time

    from galdist import display
    from galdist.control import worker
    from galdist.status import view

    folder = _run_of(folder)
    if once:
        display.LiveDisplay().print(view(folder))
        return
    going = ("running", "queued")
    with display.for_stream() as shown:
        try:
            while True:
                who = worker(folder)  # before the look at the steps, which may be over just after it
                now = view(folder)
                shown.show(now)
                if who is None and not any(step.state in going for step in now.steps):
                    break
                time.sleep(_GLANCE)
        except KeyboardInterrupt:
            print("no longer watched; the run goes on")
            return
    if any(step.state != "done" for step in now.steps):
        print(f"nobody works on it now. What was said: galdist logs --run {folder} STEP (or orchestrator)")


@app.command()
def logs(
    step: Annotated[
        str,
        typer.Argument(metavar="STEP", help="A step, its folder, or orchestrator: that of a detached run."),
    ],
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is added, until the step is over.")
    ] = False,
    rank: Annotated[int, typer.Option(min=0, help="Which rank's.")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="The run's folder. Default: the run worked on last."),
    ] = None,
) -> None:
    """Print the log of a step."""
    from galdist import control

    path = Path(step)
    if folder is None and len(path.parts) > 1:  # runs/quickstart/classifier
        folder, step = path.parent, path.name
    folder = _run_of(folder)
    place = control.step_folder(folder, step)
    try:
        for chunk in control.log(folder, place, rank, follow, lambda why: _say(f"{step}: {why or 'runs'}")):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        _say("no longer followed; the step goes on")


@app.command()
def cancel(
    folder: Folder = None,
    step: Annotated[str | None, typer.Argument(metavar="STEP", help="Only this step.")] = None,
) -> None:
    """End all jobs and processes of a run, or of one of its steps.

    What is done is kept; the same galdist run goes on.
    """
    from galdist import control

    folder = _run_of(folder)
    ended = False
    for what in control.cancel(folder, step):
        ended = True
        print(f"ended {what}")
    if not ended:
        print(f"{folder}: nothing runs and nothing waits")


@app.command()
def show(folder: Folder = None) -> None:
    """Show the results of a run."""
    from galdist.status import reports, results, steps_of

    folder = _run_of(folder)
    steps_of(folder)  # says so where there is no run
    _print_results(results(folder), None, "")
    for report in reports(folder):
        print(f"report: {report.absolute()}")


@app.command()
def tensorboard(
    folder: Folder = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on 127.0.0.1. Default: a free one.")
    ] = None,
) -> None:
    """Serve the curves of a run's trainings to a browser, until Ctrl-C."""
    import signal

    from galdist import curves, display

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with curves.tensorboard(_run_of(folder), port) as address:
        command, there = display.tunnel(address)
        print(f"{address}\nfrom another machine: {command}  then open {there}\nCtrl-C ends it", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


@app.command()
def predict(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="A train step's folder, or the model folder in it; several models of different properties "
            "are used side by side.",
        ),
    ],
    catalog: Annotated[
        Path, typer.Argument(metavar="CATALOG", help="Your table of halos: .parquet, .csv or .hdf5.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.parquet", help="Where the galaxies go; a file that is there is replaced."),
    ],
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Draws for each halo. Default: 1.")
    ] = None,
    point: Annotated[
        bool, typer.Option("--point", help="The best single value of each property instead.")
    ] = False,
    quantiles: Annotated[
        str | None,
        typer.Option(metavar="LEVELS", help="Quantiles of each property instead, such as .05,.5,.95"),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN",
            help="Where an input is in your table: log_halo_mass=M200, 'log_halo_mass=log10(M200)', or a "
            "number for all halos: Omega_m=0.3. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Give the halos of a table their galaxies, by a trained model.

    The result has a row for each halo and sample: halo (row of the table, from 0), sample, the properties.
    """
    import signal

    from galdist import inference
    from hpc.durable import NotEnoughSpace

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no half file stays

    def tell(done: "inference.Done", total: int | None) -> None:
        if sys.stderr.isatty():
            of = f" of {total}" if total is not None else ""
            print(f"\r{done.halos}{of} halos", end="\r", file=sys.stderr, flush=True)

    try:
        wanted = inference.parse_wanted(samples, point, quantiles, seed)
        renamed = inference.parse_columns(columns or [])
        done = inference.predict_file(inference.load_model(*models), catalog, out, wanted, renamed, tell)
    except inference.CheckpointError as error:
        _fail(str(error), 2)
    except NotEnoughSpace as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail(f"stopped: {out} was not written", 130)
    else:
        print(f"{out}: {done.rows} rows")
        _say(str(done))


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


@app.command("config")
def show_config(source: Source, sets: Sets = None) -> None:
    """Check a run file and print it with every default written out."""
    from galdist import config

    print(config.load(source, tuple(sets or ())).to_yaml(), end="")


benchmarks = typer.Typer(help="How fast a machine does the steps of a run.", no_args_is_help=True)
app.add_typer(benchmarks, name="bench")


@benchmarks.command("train")
def bench_train(
    source: Source,
    step: Annotated[str, typer.Option(metavar="STEP", help="The train step.")],
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="On so many ranks; by default the step's own. Repeatable."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long, on each number of ranks.")] = 20.0,
    sets: Sets = None,
    site: Annotated[str, typer.Option(envvar=_SITE, help="Machine, as of galdist run.")] = "local",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder, whose grids are read. Default: runs/NAME."),
    ] = None,
) -> None:
    """Measure a training: samples/s, share of the hardware's peak, waiting for data, memory, ranks.

    Where the step's grids are not done, boxes of random counts stand for them. Nothing is kept.
    """
    import signal

    from galdist import bench, config
    from galdist.status import size_text

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ranks end, nothing stays
    checked = config.load(source, tuple(sets or ()))
    folder = out or Path("runs") / checked.file.name
    place = next((path for path in (folder, Path("runs")) if path.is_dir()), Path())
    rows: list[list[str]] = []
    first: bench.Speed | None = None
    try:
        for now in bench.measure(
            checked, step, folder, _machine(site, False, False), ranks or [], seconds, place
        ):
            first = first or now
            faster = now.samples / first.samples
            rows.append(
                [
                    str(now.ranks),
                    f"{now.samples:.3g}",
                    f"{now.flops / 1e12:.3g}",
                    "" if now.peak is None else f"{now.flops / now.peak:.0%}",
                    f"{now.waited:.0%}",
                    "" if now.memory is None else size_text(now.memory),
                    f"{faster:.2f}",
                    f"{faster * first.ranks / now.ranks:.0%}",
                ]
            )
            _say(f"ranks {now.ranks}: {now.samples:.3g} samples/s")
    except bench.BenchError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    assert first is not None
    columns = ["ranks", "samples/s", "TFLOP/s", "of peak", "waits for data", "memory", "speed-up"]
    columns += ["efficiency"]
    _table(f"{checked.file.name}, {step}: {first.device}", columns, rows)


sites = typer.Typer(help="Descriptions of machines: slurm/sites/*.yaml.", no_args_is_help=True)
app.add_typer(sites, name="site")


@sites.command()
def check(
    site: Annotated[str, typer.Argument(metavar="SITE", envvar=_SITE, help="local, or a site's YAML file.")],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where runs go, which all nodes must see. Default: runs, or here."),
    ] = None,
) -> None:
    """Try all that runs need of a site: its queue, folders, Dask, DDP, MPI.

    Says what to mend.
    """
    from hpc import check as checks
    from hpc.site import load_site

    place = folder or (Path("runs") if Path("runs").is_dir() else Path())
    good = True
    for line in checks.check(load_site(site), place):
        good &= line.ok
        print(f"{'ok    ' if line.ok else 'FAILED'}  {line.name}: {line.detail}", flush=True)
        if line.mend:
            print(f"        mend: {line.mend}", flush=True)
    if not good:
        raise typer.Exit(1)


def _run_of(folder: Path | None) -> Path:
    """The run that is meant; one that was not named is said."""
    from galdist.control import last_run

    if folder is None:
        folder = last_run()
        _say(f"run: {folder}")
    return folder


def _say(text: str) -> None:
    """To people, beside the output."""
    print(text, file=sys.stderr, flush=True)


def _print_plan(steps: "list[PlannedStep]", folder: Path, site: "Site") -> None:
    from galdist.status import duration

    rows = []
    for entry in steps:
        ranks = resources = time = ""
        if entry.runs:
            asked = entry.resources(site).model_dump(exclude_none=True)
            ranks = f"{entry.stage.runtime} x {asked.pop('ranks')}"
            resources = ", ".join(f"{key} {value}" for key, value in asked.items())
            time = "" if entry.expected is None else duration(entry.expected)
        rows.append(
            [
                entry.name,
                entry.step.stage,
                "run" if entry.runs else "keep",
                entry.why,
                ranks,
                resources,
                time if entry.measured or not time else f"~{time}",
            ]
        )
    cores = f" ({site.cores} cores)" if site.launcher in ("local", "debug") else ""
    _table(f"Plan of {folder}{cores}", ["step", "stage", "", "why", "ranks", "asks for", "time"], rows)
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
