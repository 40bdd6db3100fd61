"""Site files: what ships loads, what is wrong is said, commands and limits follow from what is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.resources import Resources
from hpc.site import Container, Site, load_site, own_paths
from hpc.strict import SettingsError

SITES = Path(__file__).parents[1] / "slurm" / "sites"


def load(folder: Path, text: str) -> Site:
    path = folder / "site.yaml"
    path.write_text(text)
    return load_site(str(path))


@pytest.mark.parametrize("path", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_sites_that_ship(path: Path) -> None:
    site = load_site(str(path))
    assert site.launcher == "slurm"
    assert site.partition
    assert site.interface
    assert site.time
    assert Site.model_validate_json(site.model_dump_json()) == site  # as it travels to the nodes


def test_all_sites_are_there() -> None:
    assert {path.stem for path in SITES.glob("*.yaml")} == {"dev", "cpu-cluster", "4xa100", "8xh100"}


def test_times_are_written_as_people_write_them(tmp_path: Path) -> None:
    text = "launcher: slurm\ntime: 4 h\nmax_time: 1-00:00:00\ngrace: 2 min\ntimeout: 600\nheartbeat: 90 s\n"
    site = load(tmp_path, text)
    assert (site.time, site.max_time, site.grace) == (14400, 86400, 120)
    assert (site.timeout, site.heartbeat) == (600, 90)


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("STACK", "/opt/stack")
    monkeypatch.delenv("NOWHERE", raising=False)
    paths = "python: ~/venv/bin/python\nmpirun: $STACK/mpirun\nscratch: $NOWHERE/tmp\n"
    site = load(tmp_path, paths + "container: {image: ~/a.sif}\n")
    assert site.python == Path("/home/somebody/venv/bin/python")
    assert site.mpirun == Path("/opt/stack/mpirun")
    assert site.container == Container(image=Path("/home/somebody/a.sif"))
    assert site.scratch == Path("$NOWHERE/tmp"), "a variable of the node"
    with pytest.raises(
        SettingsError, match=r"python: \$NOWHERE/python names an environment variable that is not"
    ):
        load(tmp_path, "python: $NOWHERE/python\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parttion: cpu\n", r"line 1: parttion: unknown key; did you mean partition\?"),
        ("dask: {adaptiv: true}\n", r"dask.adaptiv: unknown key; did you mean adaptive\?"),
        ("mpi: mpirum\n", r"mpi: expected 'pmix', 'pmi2' or 'mpirun', got 'mpirum'; did you mean mpirun\?"),
        ("launcher: slrum\n", r"launcher: .*got 'slrum'; did you mean slurm\?"),
        ("grace: soon\n", "grace: expected a time such as 90 min, 2 h or 1:30:00, got 'soon'"),
        (
            "directives: [reservation=x]\n",
            "directives.0: expected an option of sbatch such as --reservation=x",
        ),
        ("directives: [--comment=x]\n", "directives.0: --comment is not for a site to set: leave it out"),
        ("directives: [-Mother]\n", "directives.0: -M is not for a site to set: leave it out"),
        ("directives: [--clusters=other]\n", "directives.0: --clusters is not for a site to set"),
        ("directives: [-N 2]\n", "directives.0: -N is not for a site to set: leave it out"),
        (
            "skip_directives: [mem]\n",
            "skip_directives.0: expected the long name of an option, such as --mem, got",
        ),
        ("skip_directives: ['--mem=4G']\n", "skip_directives.0: expected the long name of an option"),
        ("environment: {A: 1}\n", "environment.A: expected a valid string, got 1"),
        ("time: 3 h\nmax_time: 2 h\n", "10800 s is more than the site's max_time, 7200 s"),
        ("time: 2 min\n", "120 s is too short: .* as early as grace . 60 s = 150 s before the end"),
        ("orchestrator: {memory: much}\n", "orchestrator.memory: expected an amount of memory such as 4 GB"),
        ("max_jobs: 0\n", "max_jobs: expected greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(tmp_path, text)


def test_what_a_site_cannot_give() -> None:
    site = Site(launcher="slurm", max_time=3600, max_nodes=2, grace=30)

    def problems(**asked: int) -> dict[str, str]:
        resources = Resources(**asked)
        found = site.problems(resources, resources.layout("ddp", 2))
        return {str(problem.location[0]): problem.message for problem in found}

    assert problems(time=3600, nodes=2) == {}
    assert problems() == {}
    assert "7200 s is more than the site's max_time" in problems(time=7200)["time"]
    assert "90 s is too short" in problems(time=90)["time"]
    assert problems(nodes=3) == {"nodes": "3 nodes are more than the site's max_nodes, 2"}
    asked = Resources(nodes=9, time=5)
    assert Site(max_nodes=1).problems(asked, asked.layout("ddp", 2)) == [], (
        "without a scheduler nobody is asked"
    )


def test_command() -> None:
    assert Site().command(["-m", "hpc.rank"]) == [sys.executable, "-m", "hpc.rank"]
    assert Site(python=Path("/n/python")).command(["x"]) == ["/n/python", "x"]
    inside = Site(container=Container(image=Path("/i.sif"), options=("--nv",)))
    assert inside.command(["x"]) == ["apptainer", "exec", "--nv", "/i.sif", "python", "x"]
    own = inside.model_copy(update={"python": Path("/opt/python")})
    assert own.command(["x"]) == ["apptainer", "exec", "--nv", "/i.sif", "/opt/python", "x"]


def test_in_allocation() -> None:
    site = load_site(str(SITES / "dev.yaml"))
    inside = site.in_allocation()
    assert inside.launcher == "allocation"
    assert inside.model_copy(update={"launcher": "slurm"}) == site


def test_jobs_find_the_modules_that_this_process_finds(tmp_path: Path) -> None:
    (tmp_path / "somewhere.py").write_text("")
    code = "from hpc.site import own_paths; print(chr(10).join(own_paths()))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert str(tmp_path) in output
    assert str(SITES.parents[1]) in output, "hpc itself"
    assert not any(Path(path).is_relative_to(sys.prefix) for path in output)
    assert own_paths()


def test_the_launcher_of_one_machine_is_not_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python", "mpiexec.gforker", "mpirun"):
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    for nodes, launcher in ((None, "mpiexec.gforker"), ("1", "mpiexec.gforker"), ("2", "mpirun")):
        monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
        if nodes is not None:
            monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
        assert Site().find_mpirun() == tmp_path / launcher


def test_variables_of_sbatch_do_not_win_over_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpc import slurm

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX", "SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_JOB_NAME"):
        monkeypatch.setenv(name, "x")
    seen = {line.partition("=")[0] for line in slurm.run(["env"]).splitlines()}
    assert {"SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_JOB_NAME"} <= seen
    assert not {"SBATCH_TIMELIMIT", "SBATCH_ARRAY_INX"} & seen


def test_nothing_names_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is to be mended; who has been answered before waits instead until the name servers are back."""
    from hpc import slurm

    words = (
        "squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "squeue: error: fetch_config: DNS SRV lookup failed\n"
        "squeue: error: _establish_config_source: failed to fetch config\n"
        "squeue: fatal: Could not establish a configuration source\n"
    )
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\nprintf '{words}' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_has_answered", False)
    with pytest.raises(slurm.SlurmError, match=r"set SLURM_CONF to the path of its slurm\.conf") as caught:
        slurm.states(["1"])
    assert not isinstance(caught.value, slurm.Unreachable)
    slurm.run(["true"])
    with pytest.raises(slurm.Unreachable):
        slurm.states(["1"])


def test_jobs_with_gpus_have_a_queue_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "launcher: slurm\npartition: cpu\naccount: a\nqos: low\n"
        "gpu: {partition: gpu, account: a-gpu, constraint: a100, directives: [--exclusive]}\n"
    )
    site = load_site(str(path))
    queue = site.for_gpus()
    assert (queue.partition, queue.account, queue.qos, queue.constraint) == ("gpu", "a-gpu", "low", "a100")
    assert queue.directives == ("--exclusive",)
    assert (site.partition, site.directives) == ("cpu", ())
    assert Site(partition="cpu").for_gpus().partition == "cpu"
