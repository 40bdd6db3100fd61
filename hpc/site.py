"""The facts of the machine that a run uses."""

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hpc import strict
from hpc.strict import StrictModel


class Site(StrictModel):
    """A machine. The default is the one this process runs on."""

    launcher: Literal["local", "debug"] = "local"
    """``local``: processes of this machine. ``debug``: one rank, inside the calling process."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores that a run may use; by default those this process may use."""
    mpirun: Path | None = None
    """The launcher of MPI ranks; by default the one installed beside this Python, then the one on PATH."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables set for every process."""

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
        for found in (beside / "mpiexec.gforker", beside / "mpirun", shutil.which("mpirun")):
            if found is not None and Path(found).exists():
                return Path(found)
        raise FileNotFoundError(
            f"no mpirun beside {sys.executable} and none on PATH: install one with `pip install mpich`, "
            "or ask for one rank (resources: {ranks: 1})"
        )


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
            name, [strict.Problem((), "no such site: name local, debug, or a YAML file that describes one")]
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
