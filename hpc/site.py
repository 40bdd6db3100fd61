"""The facts of the machine that a run uses."""

import math
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from hpc import strict
from hpc.resources import Duration, Layout, Resources
from hpc.strict import Problem, StrictModel

_OWN_OPTIONS = {
    *(
        "--array",
        "--clusters",
        "--comment",
        "--error",
        "--nodes",
        "--no-requeue",
        "--ntasks",
        "--ntasks-per-node",
    ),
    *("--open-mode", "--output", "--requeue", "--signal", "--wait"),
    *("-M", "-N", "-W", "-a", "-e", "-n", "-o"),
}
"""What jobs are found, laid out and told by. Other clusters are not asked for them."""
_EARLY = 60  # seconds by which Slurm's sign of the time limit may come too early


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = os.path.expanduser(os.path.expandvars(value))
    if "$" in text:
        raise ValueError(f"{value} names an environment variable that is not set")
    return text


def _option(value: str) -> str:
    if not value.startswith("-") or "\n" in value:
        raise ValueError(f"expected an option of sbatch such as --reservation=x, got {value!r}")
    name = re.split("[= ]", value)[0] if value.startswith("--") else value[:2]
    if name in _OWN_OPTIONS:
        raise ValueError(f"{name} is not for a site to set: leave it out")
    return value


def _option_name(value: str) -> str:
    if not re.fullmatch(r"--[a-z-]+", value):
        raise ValueError(f"expected the long name of an option, such as --mem, got {value!r}")
    return value


LocalPath = Annotated[Path, BeforeValidator(_path)]
"""A path as people write it: ``~`` and variables such as ``$HOME`` are replaced."""


class Container(StrictModel):
    """An Apptainer image in which ranks and Dask workers run."""

    image: LocalPath
    options: tuple[str, ...] = ()
    """Of ``apptainer exec``: ``--nv`` for GPUs, ``--bind=/scratch``."""


Directive = Annotated[str, AfterValidator(_option)]


class GpuSite(StrictModel):
    """What is different for jobs with GPUs; what is not said here is as for the others."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    directives: tuple[Directive, ...] | None = None


class DaskSite(StrictModel):
    """How Dask uses the cluster."""

    adaptive: bool = False
    """Worker jobs come and go with the work; otherwise all are asked for at once."""
    dashboard: Literal["loopback", "interface"] = "loopback"
    """Where the dashboard listens: on the node alone (reached through an ssh tunnel), or on the interface."""


class Site(StrictModel):
    """A machine or a cluster. The default is the machine this process runs on."""

    launcher: Literal["local", "debug", "slurm", "allocation"] = "local"
    """``local``: processes of this machine. ``debug``: one rank, inside the calling process. ``slurm``: every
    step is a Slurm job. ``allocation``: steps of the Slurm job that this process is in."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores that a run may use; by default those this process may use."""
    mpirun: LocalPath | None = None
    """The launcher of MPI ranks; by default the one installed beside this Python, then the one on PATH."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables set for every process, as they are written here: nothing in them is expanded."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    directives: tuple[Directive, ...] = ()
    """More options of sbatch, ``--reservation=x``. They come last and so win."""
    gpu: GpuSite | None = None
    """The same five for jobs with GPUs."""
    skip_directives: tuple[Annotated[str, AfterValidator(_option_name)], ...] = ()
    """Options that this site rejects, ``--mem``: they are left out of every batch script."""
    setup: tuple[str, ...] = ()
    """Lines of bash before anything starts, ``module load cuda``. A job ends with the first that fails."""
    container: Container | None = None
    python: LocalPath | None = None
    """Python of the compute nodes; by default the one that runs this, in a container that of the image."""
    interface: str | None = None
    """Network interface of DDP, Dask and dashboards: ``ib0``."""
    scratch: Path | None = None
    """Folder on each node's own disk, for what Dask workers spill. Variables are the node's: ``$TMPDIR``."""
    mpi: Literal["pmix", "pmi2", "mpirun"] = "mpirun"
    """How MPI ranks start: ``srun --mpi=pmix``, ``srun --mpi=pmi2``, or ``mpirun`` inside the job."""
    srun: tuple[str, ...] = ()
    """More options of srun, ``--cpu-bind=cores``."""
    time: Duration | None = None
    """Time limit [s] of steps that give none; by default the partition's."""
    max_time: Duration | None = None
    """Largest time limit [s] that the partition takes."""
    grace: Duration = 90
    """Seconds a job gets to save its state: before its time limit, and when it is preempted."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a crashed step is started again from its last checkpoint."""
    timeout: Duration = 600
    """A collective of DDP that takes longer [s] is a failure."""
    heartbeat: Duration = 120
    """A rank that is silent for longer [s] is dead."""
    max_jobs: Annotated[int, Field(ge=1)] | None = None
    """Jobs of one run in the queue at once."""
    max_nodes: Annotated[int, Field(ge=1)] | None = None
    """Most nodes of one step."""
    dask: DaskSite = DaskSite()
    orchestrator: Resources = Resources(cpus=1, memory=2 * 2**30)
    """Of the job that ``galdist run --detach`` queues."""

    @model_validator(mode="after")
    def _times_fit(self) -> "Site":
        problems = self._time_problems(self.time) + self._time_problems(self.max_time)
        if problems:
            raise ValueError(problems[0])
        return self

    def _time_problems(self, limit: int | None) -> list[str]:
        if limit is None:
            return []
        problems = []
        if self.max_time is not None and limit > self.max_time:
            problems.append(f"a time of {limit} s is more than the site's max_time, {self.max_time} s")
        if limit <= self.grace + _EARLY:
            problems.append(
                f"a time of {limit} s is too short: jobs are told to save their state as early as grace "
                f"+ {_EARLY} s = {self.grace + _EARLY} s before the end; ask for more, or for a shorter grace"
            )
        return problems

    def problems(self, resources: Resources, layout: Layout) -> list[Problem]:
        """What a job asks for and this site does not have; each is located at a key of ``resources``."""
        if self.launcher != "slurm":
            return []
        found = [Problem(("time",), text) for text in self._time_problems(resources.time)]
        if self.max_nodes is not None and layout.nodes > self.max_nodes:
            text = f"{layout.nodes} nodes are more than the site's max_nodes, {self.max_nodes}"
            found.append(Problem(("nodes",), text))
        return found

    @property
    def cores(self) -> int:
        """Number of cores that a run may use."""
        return self.cpus or available_cores()

    def find_mpirun(self) -> Path:
        """Path of ``mpirun``.

        Raises
        ------
        FileNotFoundError
            where there is none; the message says how to get it.
        """
        if self.mpirun is not None:
            if not self.mpirun.exists():
                raise FileNotFoundError(f"mpirun of the site file does not exist: {self.mpirun}")
            return self.mpirun
        beside = Path(sys.executable).parent
        # MPICH's gforker only knows this machine, and so, unlike its mpirun, opens no port to the network.
        alone = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        gforker = [beside / "mpiexec.gforker"] if alone else []
        for found in (*gforker, beside / "mpirun", shutil.which("mpirun")):
            if found is not None and Path(found).exists():
                return Path(found)
        raise FileNotFoundError(
            f"no mpirun beside {sys.executable} and none on PATH: install one with `pip install mpich`, "
            "or ask for one rank (resources: {ranks: 1})"
        )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Command that runs Python with ``arguments`` on a compute node, in the container if there is one."""
        if self.container is None:
            return [str(self.python or sys.executable), *arguments]
        inside = ["apptainer", "exec", *self.container.options, str(self.container.image)]
        return [*inside, str(self.python or "python"), *arguments]

    def for_gpus(self) -> "Site":
        """This site as jobs with GPUs see it."""
        return self.model_copy(update=self.gpu.model_dump(exclude_none=True) if self.gpu else {})

    def in_allocation(self) -> "Site":
        """This site for a process that is inside a Slurm job whose nodes its steps are to use."""
        return self.model_copy(update={"launcher": "allocation"})


def load_site(name: str) -> Site:
    """The site called ``local`` or ``debug``, or the one that a YAML file describes.

    Raises
    ------
    hpc.strict.SettingsError
        for an unknown name, a file that cannot be read and unknown keys.
    """
    if name in ("local", "debug"):
        return Site(launcher=name)  # type: ignore[arg-type]
    if not name.endswith((".yaml", ".yml")):
        raise strict.SettingsError(
            name, [Problem((), "no such site: name local, debug, or a YAML file that describes one")]
        )
    document = strict.read_yaml(name)
    site, problems = strict.validate(Site, document.data if document.data is not None else {})
    if site is None:
        raise strict.SettingsError(name, problems, document.lines)
    return site


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, and the CPU quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def own_paths() -> list[str]:
    """Where this process finds modules apart from its Python's own folders: jobs must find the same ones."""
    own = (Path(sys.prefix), Path(sys.base_prefix))
    paths = [Path(entry or os.getcwd()).absolute() for entry in sys.path]
    here = Path(__file__).absolute().parent.parent
    return [
        str(path)
        for path in dict.fromkeys([*paths, here])
        if path.exists() and not any(path.is_relative_to(prefix) for prefix in own)
    ]
