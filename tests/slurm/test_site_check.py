"""The check of a site, on a real Slurm: all well, and one thing wrong at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.check import Line, check
from hpc.site import GpuSite, Site, load_site

DEV = Path(__file__).parents[2] / "slurm" / "sites" / "dev.yaml"
SOUND = [
    "commands",
    "controller",
    "partition",
    "accounting",
    "start",
    "python",
    "folder",
    "locks",
    "interface",
]
JOBS = "check-serial,check-ddp,check-mpi,check-dask"


def dev(**changes: Any) -> Site:
    return Site.model_validate(load_site(str(DEV)).model_dump() | changes)


def queued() -> str:
    command = ["squeue", "--noheader", "--states=pending,running", f"--name={JOBS}", "--format=%i %j %T"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def checked(site: Site, folder: Path, patience: float = 60.0) -> dict[str, Line]:
    lines = list(check(site, folder, patience))
    assert all(line.mend for line in lines if not line.ok), "each failure says what to mend"
    assert not list(folder.iterdir()), "nothing is left behind"
    assert queued() == ""
    return {line.name: line for line in lines}


def failure(site: Site, folder: Path, patience: float = 60.0) -> Line:
    """The only line that is not well."""
    lines = checked(site, folder, patience)
    wrong = [line for line in lines.values() if not line.ok]
    assert len(wrong) == 1, wrong
    return wrong[0]


def test_all_is_well(tmp_path: Path) -> None:
    started = time.monotonic()
    lines = checked(dev(), tmp_path)
    assert time.monotonic() - started < 60
    assert all(line.ok for line in lines.values()), lines
    assert list(lines) == [*SOUND, "ports", "ddp", "mpi", "dask", "dashboard"]
    for name, expected in {
        "start": r"job \d+ started \d+ s after it was queued, on n\d",
        "ports": r"n\d \(127.0.0.1\) and n\d \(127.0.0.1\) reach each other",
        "ddp": r"2 ranks on n\d, n\d sum numbers, on cpu",
        "mpi": r"a world of 4 ranks on n\d, n\d",
        "dask": r"2 workers on n\d compute",
        "dashboard": r"served on n\d at http://127.0.0.1:\d+/.*/status; runs print the ssh command",
    }.items():
        assert re.match(expected, lines[name].detail), lines[name]


@pytest.mark.parametrize(
    ("changes", "name", "detail"),
    [
        ({"partition": "scavange"}, "partition", "no partition 'scavange'; did you mean scavenge?"),
        ({"gpu": GpuSite(partition="gpu")}, "gpu.partition", "no partition 'gpu'; did you mean cpu?"),
        ({"max_nodes": 9}, "limits", "max_nodes is 9, but cpu gives 4"),
        ({"constraint": "a100&nvlink"}, "constraint", "no node of cpu has the feature a100, nvlink"),
        ({"account": "rot"}, "account", "root may not use 'rot'; did you mean root?"),
        ({"qos": "high"}, "qos", "root may not use 'high'; known: normal"),
    ],
)
def test_what_slurm_does_not_know(changes: dict[str, Any], name: str, detail: str, tmp_path: Path) -> None:
    line = failure(dev(**changes), tmp_path)
    assert line.name == name
    assert detail in line.detail
    assert f"correct `{name}` in the site file" in line.mend or "lower `max_nodes`" in line.mend


def test_what_sbatch_refuses(tmp_path: Path) -> None:
    line = failure(dev(directives=["--partition=nowhere"]), tmp_path)
    assert line.name == "queue"
    assert "invalid partition specified: nowhere" in line.detail
    assert "#SBATCH --partition=nowhere" in line.detail


def test_long_queue(tmp_path: Path) -> None:
    line = failure(dev(directives=["--begin=now+1hour"]), tmp_path, patience=4)
    assert line.name == "start"
    assert "has not started after" in line.detail
    assert "(BeginTime)" in line.detail
    assert "the queue is long" in line.mend


def test_setup_that_fails(tmp_path: Path) -> None:
    line = failure(dev(setup=["export GOOD=1", "cd /proc/not-there"]), tmp_path)
    assert line.name == "setup"
    assert line.detail.startswith("cd /proc/not-there\n")
    assert "No such file or directory" in line.detail
    assert "`setup` in the site file" in line.mend


def test_python_that_is_not_there(tmp_path: Path) -> None:
    line = failure(dev(python="/proc/not-there/python"), tmp_path)
    assert line.name == "python"
    assert "the node has no /proc/not-there/python" in line.detail
    assert "`python` in the site file" in line.mend


def test_python_without_our_packages(tmp_path: Path) -> None:
    """Another Python of this machine: whatever it lacks, the line says that it is the nodes' Python."""
    other = shutil.which("python3", path="/usr/bin")
    if other is None:
        pytest.skip("there is no other Python: /usr/bin/python3")
    line = failure(dev(python=other), tmp_path)
    assert line.name == "python"
    assert "No module named" in line.detail
    assert line.mend == f"install galdist's packages for {other} of the nodes"


def test_container_without_apptainer(tmp_path: Path) -> None:
    line = failure(dev(container={"image": "/proc/not-there.sif"}), tmp_path)
    assert line.name == "python"
    assert "the node has no apptainer" in line.detail
    assert "load apptainer in `setup`" in line.mend


def test_interface_that_is_not_there(tmp_path: Path) -> None:
    line = failure(dev(interface="ib7"), tmp_path)
    assert line.name == "interface"
    assert "has no 'ib7' with an address; it has lo (127.0.0.1)" in line.detail
    assert "`interface` in the site file" in line.mend


@pytest.mark.parametrize(
    ("scratch", "detail"),
    [
        ("/proc/not-there", "cannot write in /proc on n"),
        ("$NOT_THERE/x", "$NOT_THERE/x names a variable that is not set on n"),
    ],
)
def test_scratch_that_takes_nothing(scratch: str, detail: str, tmp_path: Path) -> None:
    line = failure(dev(scratch=scratch), tmp_path)
    assert line.name == "scratch"
    assert detail in line.detail


@pytest.mark.parametrize("changes", [{"mpi": "pmix"}, {"srun": ["--mpi=none"]}])
def test_mpi_that_does_not_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    """Slurm's pmix plugin finds no library; without any plugin there are many worlds of one rank."""
    line = failure(dev(**changes), tmp_path)
    assert line.name == "mpi"
    assert (
        "Invalid MPI type 'pmix'" if "mpi" in changes else "4 MPI ranks were started but this one sees 1"
    ) in line.detail
    assert "in the site file has to fit the MPI library of mpi4py" in line.mend


def test_folder_that_nodes_do_not_see(tmp_path: Path) -> None:
    """The check runs where a file system of its own lies over the folder."""
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("only root can give a process a view of the file system of its own")
    program = (
        "import json, sys; from pathlib import Path\n"
        "from hpc.check import check; from hpc.site import load_site\n"
        "print(json.dumps([vars(line) for line in check(load_site(sys.argv[1]), Path(sys.argv[2]))]))"
    )
    mount = 'mount -t tmpfs none "$2" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", mount, sys.executable, str(DEV), str(tmp_path), program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *well, line = json.loads(done.stdout)
    assert all(other["ok"] for other in well)
    assert (line["name"], line["ok"]) == ("folder", False)
    assert f"nothing that it wrote in {tmp_path} is seen here" in line["detail"]
    assert "a folder that this machine and the nodes share" in line["mend"]
    assert queued() == ""


def test_left_early(tmp_path: Path) -> None:
    """Ctrl-C in the middle."""
    lines = check(dev(setup=["export GOOD=1", "cd /tmp"]), tmp_path)
    found = next(line for line in lines if line.name == "setup")
    assert found == Line("setup", True, "export GOOD=1; cd /tmp")
    lines.close()
    assert not list(tmp_path.iterdir())
    assert queued() == ""
