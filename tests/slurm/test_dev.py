"""The development Slurm itself, ``slurm/dev``: tried on one that these tests start for themselves."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

DEV = Path(__file__).parents[2] / "slurm" / "dev"
DAEMONS = ["munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd.n1", "slurmd.n2", "slurmd.n3", "slurmd.n4"]


@dataclass
class Cluster:
    """A development Slurm in a folder of its own."""

    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Another SLURM_CONF or port, of the Slurm these tests run beside, is not for this one."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "GALDIST_DEV_SLURM"))}
        self.environment = {
            **inherited,
            "GALDIST_DEV_SLURM": str(self.folder),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __call__(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell; ``$DEV`` is slurm/dev."""
        environment = {**self.environment, "DEV": str(DEV)}
        return subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120
        )

    def output(self, command: str) -> str:
        done = self(command)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def pids(self) -> dict[str, int]:
        lines = (line.split() for line in self("$DEV/status").stdout.splitlines())
        return {words[0].rstrip(","): int(words[-1]) for words in lines if words[1:2] == ["up,"]}

    def processes(self) -> list[psutil.Process]:
        """Everything that runs with this cluster's SLURM_CONF: daemons, jobs, what they left."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found

    def listening(self) -> set[tuple[str, str]]:
        """Names of processes, and the addresses on which they listen."""
        return {
            (process.name(), connection.laddr.ip)
            for process in self.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def wait_for(self, command: str, answer: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (last := self(command).stdout.strip()) != answer:
            assert time.monotonic() < deadline, f"{command} says {last!r}, not {answer!r}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dev"))
    try:
        made.output("$DEV/up")
        yield made
    finally:
        made("$DEV/down")


def test_up_prints_only_the_line_to_evaluate(cluster: Cluster) -> None:
    assert cluster.output("$DEV/up") == f"export SLURM_CONF={cluster.folder}/slurm.conf"


def test_up_leaves_alone_what_is_up(cluster: Cluster) -> None:
    before = cluster.pids()
    assert list(before) == DAEMONS
    cluster.output("$DEV/up")
    assert cluster.pids() == before


def test_four_nodes_with_gpus(cluster: Cluster) -> None:
    ran = cluster.output(
        "srun --nodes=4 --gpus-per-node=2 bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    )
    assert sorted(ran.splitlines()) == [f"n{i} 0,1" for i in (1, 2, 3, 4)]


def test_a_node_has_four_cpus_and_6000_mb(cluster: Cluster) -> None:
    assert cluster.output("sinfo --noheader --partition=cpu --format='%c %m %D'") == "4 6000 4"


def test_sacct_tells_what_a_job_used(cluster: Cluster) -> None:
    burn = "import time\nx = b'1' * 200_000_000\nwhile time.process_time() < 4: sum(range(9999))"
    job = cluster.output(f'sbatch --parsable --wait --output=/dev/null --wrap "srun python3 -c \\"{burn}\\""')
    used = f"sacct --noheader --parsable2 --units=M --job={job} --format=JobID,State,TotalCPU,MaxRSS"
    step = next(line for line in cluster.output(used).splitlines() if line.startswith(f"{job}.0|"))
    _, state, cpu, memory = step.split("|")
    assert state == "COMPLETED"
    assert 4 <= float(cpu.partition(":")[2]) < 8
    assert 200e6 / 2**20 < float(memory.removesuffix("M")) < 300


def test_cpu_pushes_out_scavenge(cluster: Cluster) -> None:
    """The step gets its SIGTERM early in the time of grace; it ends with that, and the other job starts."""
    ask = "--partition=scavenge --nodes=4 --exclusive --output=/dev/null"
    job = cluster.output(f"sbatch --parsable {ask} --wrap 'srun sleep 100'")
    cluster.wait_for(f"sacct --noheader --format=State --job={job}.0 | tr -d ' '", "RUNNING")
    assert cluster.output("srun --nodes=4 --exclusive --immediate=12 true; echo $?") == "0"
    assert cluster.output(f"squeue --noheader --states=all --job={job} --format=%T") != "RUNNING"
    cluster("scancel --user=$(id -un)")


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    """Not the daemons, not srun while a job runs, not slurmstepd."""
    job = cluster.output("sbatch --parsable --nodes=2 --output=/dev/null --wrap 'srun --mpi=pmi2 sleep 100'")
    cluster.wait_for(f"squeue --noheader --steps --job={job} --format=%i | grep -c '[.]0'", "1")
    listening = cluster.listening()
    cluster.output(f"scancel {job}")
    assert {"slurmctld", "slurmd", "slurmdbd", "mariadbd", "srun"} <= {name for name, _ in listening}
    assert {ip for _, ip in listening} == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd.n2"])
def test_up_repairs_what_was_killed(cluster: Cluster, name: str) -> None:
    before = cluster.pids()
    os.kill(before[name], signal.SIGKILL)
    psutil.wait_procs([process for process in cluster.processes() if process.pid == before[name]], timeout=10)
    status = cluster("$DEV/status")
    assert status.returncode == 1
    assert f"{name} down" in status.stdout.splitlines()
    cluster.output("$DEV/up")
    after = cluster.pids()
    assert after.pop(name) != before.pop(name)
    assert after == before
    assert cluster.output("srun --nodelist=n2 bash -c 'echo $SLURMD_NODENAME'") == "n2"


def test_up_resumes_a_node_that_was_set_down(cluster: Cluster) -> None:
    cluster.output("scontrol update nodename=n3 state=down reason=test")
    cluster.wait_for("sinfo --noheader --nodes=n3 --partition=cpu --format=%T", "down")
    cluster.output("$DEV/up")
    assert cluster.output("sinfo --noheader --nodes=n3 --partition=cpu --format=%T") == "idle"


def test_a_restart_of_slurmctld_alone_leaves_jobs_running(cluster: Cluster) -> None:
    job = cluster.output("sbatch --parsable --nodes=2 --output=/dev/null --wrap 'srun sleep 100'")
    cluster.wait_for(f"squeue --noheader --job={job} --format=%T", "RUNNING")
    cluster.output("$DEV/down slurmctld")
    assert cluster("scontrol ping").returncode == 1
    assert set(cluster.pids()) == {*DAEMONS} - {"slurmctld"}
    cluster.output("$DEV/up")
    assert cluster.output(f"squeue --noheader --job={job} --format=%T") == "RUNNING"
    assert cluster.output(f"scontrol show job {job} | grep -o 'Restarts=.'") == "Restarts=0"
    cluster.output(f"scancel {job}")


def test_down_ends_jobs_and_what_they_left(tmp_path_factory: pytest.TempPathFactory) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    tmp_path = tmp_path_factory.mktemp("down")
    cluster = Cluster(tmp_path / "dev")
    try:
        cluster.output("$DEV/up")
        stubborn = "trap : TERM; setsid sleep 1000 & touch ready; while :; do sleep 1; done"
        job = cluster.output(f"cd {tmp_path} && sbatch --parsable --output=/dev/null --wrap '{stubborn}'")
        cluster.wait_for(f"ls {tmp_path}/ready", f"{tmp_path}/ready")
        assert "sleep" in {process.name() for process in cluster.processes()}, job
    finally:
        down = cluster("$DEV/down")
    assert down.returncode == 0, down.stderr
    assert cluster.processes() == []
    assert Path("/etc/hosts").read_bytes() == hosts
    assert cluster("$DEV/down").returncode == 0
    assert cluster("$DEV/status").returncode == 1


def test_two_of_them_have_ports_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    port = int((cluster.folder / "port").read_text())
    other = Cluster(tmp_path / "dev")
    other.environment["GALDIST_DEV_SLURM_PORT"] = str(port - 1)
    refused = other("$DEV/up")
    assert refused.returncode == 1
    assert f"ports {port - 1}..{port + 5} is taken" in refused.stderr


def test_with_takes_it_down_and_hands_on_the_status(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("with")  # short: sockets lie below
    cluster = Cluster(tmp_path)  # for its environment only
    cluster.environment["TMPDIR"] = str(tmp_path)
    done = cluster("$DEV/with bash -c 'echo $SLURM_CONF; squeue --noheader || exit 9; exit 5'")
    assert done.returncode == 5, done.stderr
    folder = Path(done.stdout.strip()).parent
    assert folder.parent == tmp_path
    assert f"logs are in {folder}/log" in done.stderr
    assert Cluster(folder).processes() == []


def test_with_cleans_up_after_an_interrupt(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("with")
    environment = {**Cluster(tmp_path).environment, "TMPDIR": str(tmp_path)}
    command = [DEV / "with", "bash", "-c", "echo $SLURM_CONF; exec sleep 100"]
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    folder = Path(running.stdout.readline().strip()).parent
    os.killpg(running.pid, signal.SIGINT)  # what Ctrl-C sends: to the command too
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert Cluster(folder).processes() == []


@pytest.mark.parametrize("address", ["127.0.1.1", "192.0.2.7"])
def test_a_machine_of_another_name(address: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As in Debian and in many containers: it has a line in /etc/hosts while Slurm is up."""
    tmp_path = tmp_path_factory.mktemp("name")
    hosts = tmp_path / "hosts"  # seen as /etc/hosts by what runs in namespaces of its own
    hosts.write_text(before := f"127.0.0.1 localhost\n{address} elsewhere\n")
    cluster = Cluster(tmp_path / "dev")

    def there(command: str) -> str:
        rename = f"hostname elsewhere && mount --bind {hosts} /etc/hosts"
        return f"unshare --mount --uts bash -c '{rename} && {command}'"

    if cluster(there("true")).returncode != 0:
        pytest.skip("no right to give this machine another name")
    try:
        cluster.output(there("$DEV/up && srun --nodes=4 true"))
        assert hosts.read_text() == f"127.0.0.1 elsewhere # galdist dev slurm {cluster.folder}\n{before}"
        listening = cluster.listening()
    finally:
        cluster(there("$DEV/down"))
    assert "slurmctld" in {name for name, _ in listening}
    assert {ip for _, ip in listening} == {"127.0.0.1"}
    assert hosts.read_text() == before
    assert cluster.processes() == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("$DEV/up now", "usage: slurm/dev/up"),
        ("$DEV/down slurmd", "no daemon is called slurmd; there are munged mariadbd"),
        ("GALDIST_DEV_SLURM=$GALDIST_DEV_SLURM/$(printf '%080d' 1) $DEV/up", "too long for sockets in it"),
        ("$DEV/with", "usage: slurm/dev/with COMMAND"),
    ],
)
def test_what_is_wrong_is_said(cluster: Cluster, command: str, words: str) -> None:
    done = cluster(command)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_missing_programs_are_named(tmp_path: Path) -> None:
    """With a PATH that holds neither Slurm's commands nor apt-get."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "mkdir", "flock", "id", "cat", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))
    cluster = Cluster(tmp_path / "dev")
    cluster.environment["PATH"] = str(tools)
    done = cluster("$DEV/up")
    assert done.returncode == 3, done.stderr
    missing, mend = done.stderr.splitlines()
    assert missing.endswith("sbatch srun sacct scontrol")
    assert "sudo apt-get install --no-install-recommends munge slurmctld slurmd" in mend
