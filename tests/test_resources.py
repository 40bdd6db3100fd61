"""How the processes of a job lie on nodes: what is asked for is what is got, or an error before the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc import slurm
from hpc.resources import Layout, Resources, n_bytes, seconds
from hpc.strict import SettingsError, validate

RUNTIMES = ("serial", "dask", "ddp", "mpi")
few = st.one_of(st.none(), st.integers(1, 12))


@given(
    runtime=st.sampled_from(RUNTIMES),
    default=st.integers(1, 9),
    resources=st.builds(
        Resources, ranks=few, nodes=few, min_nodes=few, cpus=few, gpus=st.one_of(st.none(), st.integers(0, 8))
    ),
)
def test_a_layout_is_what_was_asked_for(runtime: str, default: int, resources: Resources) -> None:
    try:
        layout = resources.layout(runtime, default)
    except SettingsError:
        return  # which of them must not be errors, the next test says
    assert layout.ranks == layout.nodes * layout.ranks_per_node >= 1
    assert 1 <= layout.min_nodes <= layout.nodes
    assert layout.min_nodes == (resources.min_nodes or layout.nodes)
    assert layout.ranks == (resources.ranks or layout.ranks)
    assert layout.nodes == (resources.nodes or layout.nodes)
    assert (layout.cpus, layout.gpus) == (resources.cpus or 1, resources.gpus or 0)
    if runtime == "serial":
        assert layout.ranks == 1
    elif runtime == "ddp" and layout.gpus:
        assert layout.ranks_per_node <= layout.gpus
        if resources.ranks is None:
            assert layout.ranks_per_node == layout.gpus
    elif resources.ranks is None:
        assert (
            0 <= layout.ranks - default < layout.nodes
        )  # rounded up to fill the nodes, by no more than that
    if runtime == "dask" and resources.nodes is None:
        assert layout.ranks_per_node == 1


@given(runtime=st.sampled_from(RUNTIMES), nodes=st.integers(1, 9), per_node=st.integers(1, 9))
def test_ranks_that_fill_the_nodes_are_accepted(runtime: str, nodes: int, per_node: int) -> None:
    if runtime == "serial":
        nodes = per_node = 1
    layout = Resources(nodes=nodes, ranks=nodes * per_node).layout(runtime, default_ranks=5)
    assert layout == Layout(nodes, nodes, per_node, cpus=1, gpus=0)


def test_layouts() -> None:
    assert Resources().layout("ddp", 2) == Layout(1, 1, 2, 1, 0)
    assert Resources(nodes=2, gpus=4, cpus=16).layout("ddp", 2) == Layout(2, 2, 4, 16, 4)
    assert Resources(nodes=4, min_nodes=2, gpus=8).layout("ddp", 2) == Layout(4, 2, 8, 1, 8)
    assert Resources(ranks=6).layout("dask", 2) == Layout(6, 6, 1, 1, 0)
    assert Resources(ranks=6, nodes=2).layout("dask", 2) == Layout(2, 2, 3, 1, 0)
    assert Resources(nodes=3).layout("mpi", 2) == Layout(3, 3, 1, 1, 0)


@pytest.mark.parametrize(
    ("runtime", "resources", "key", "words"),
    [
        ("ddp", {"ranks": 5, "nodes": 2}, "ranks", "5 for 2 nodes, which each get as many: ask for 4 or 6"),
        ("mpi", {"ranks": 1, "nodes": 2}, "ranks", "1 for 2 nodes, which each get as many: ask for 2$"),
        (
            "ddp",
            {"ranks": 8, "gpus": 2, "nodes": 2},
            "ranks",
            "8 ranks for 4 GPUs .2 nodes of 2.: at most one",
        ),
        ("ddp", {"nodes": 2, "min_nodes": 3}, "min_nodes", "3 is more than nodes, which is 2"),
        ("ddp", {"nodes": 4, "min_nodes": 3}, "min_nodes", "3 does not divide nodes, which is 4"),
        ("mpi", {"nodes": 2, "min_nodes": 1}, "min_nodes", "only a DDP job can go on with fewer nodes"),
        ("serial", {"ranks": 2}, "ranks", "the stage is one process: leave ranks out"),
        ("serial", {"nodes": 2}, "nodes", "the stage is one process: leave nodes out"),
    ],
)
def test_what_cannot_be_laid_out(runtime: str, resources: dict[str, int], key: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        Resources(**resources).layout(runtime, 2)
    assert caught.value.problems[0].location == (key,)


@pytest.mark.parametrize(
    ("runtime", "resources", "expected"),
    [
        ("ddp", {}, Layout(2, 2, 2, 3, 0)),
        ("mpi", {}, Layout(2, 2, 2, 3, 0)),
        ("ddp", {"nodes": 1}, Layout(1, 1, 2, 3, 0)),
        ("mpi", {"ranks": 4}, Layout(2, 2, 2, 3, 0)),
        ("mpi", {"ranks": 3}, Layout(1, 1, 3, 2, 0)),
        ("ddp", {"ranks": 1, "cpus": 2}, Layout(1, 1, 1, 2, 0)),
        ("ddp", {"gpus": 3}, Layout(2, 2, 3, 2, 3)),
        ("dask", {}, Layout(2, 2, 1, 1, 0)),
        ("serial", {}, Layout(1, 1, 1, 6, 0)),
        ("serial", {"cpus": 2}, Layout(1, 1, 1, 2, 0)),
    ],
)
def test_what_is_left_open_in_an_allocation_is_what_sbatch_was_told(
    runtime: str, resources: dict[str, int], expected: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sbatch --nodes=2 --ntasks-per-node=2 --cpus-per-task=3``, on nodes one of which is given whole."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "8,6")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert slurm.of_own_job(Resources(**resources), runtime).layout(runtime, 2) == expected


def test_a_rank_a_gpu_of_the_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "32(x2)")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    found = slurm.of_own_job(Resources(), "ddp")
    assert found.layout("ddp", 2) == Layout(2, 2, 4, 8, 4)
    found = slurm.of_own_job(Resources(), "mpi")
    assert found.layout("mpi", 2) == Layout(2, 2, 2, 16, 0)
    found = slurm.of_own_job(Resources(ranks=6), "ddp")
    assert found.layout("ddp", 2) == Layout(2, 2, 3, 10, 0), "what a step says wins"


def test_resources_are_strict() -> None:
    _, problems = validate(Resources, {"node": 2, "min_nodes": 0, "retries": -1})
    texts = {problem.location: problem.message for problem in problems}
    assert texts[("node",)] == "unknown key; did you mean nodes?"
    assert "greater than or equal to 1" in texts[("min_nodes",)]
    assert "greater than or equal to 0" in texts[("retries",)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90 min", 5400),
        ("1.5 h", 5400),
        ("00:00", 0),
        ("12:30", 750),
        ("03:04.500", 184.5),
        ("1:30:00", 5400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:01", 172801),
    ],
)
def test_durations_of_people_and_of_slurm(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "10", "soon", "1:2:3:4", "1.2.3 h", "3 weeks", "-1:00", "UNLIMITED"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time such as 90 min"):
        seconds(text)


def test_memory_of_people_and_of_slurm() -> None:
    assert (n_bytes("6000M"), n_bytes("1.5 GiB"), n_bytes("12416K")) == (
        6000 * 2**20,
        3 * 2**29,
        12416 * 2**10,
    )
    with pytest.raises(ValueError, match="expected an amount of memory such as 4 GB"):
        n_bytes("1.2.3 GB")
