"""The ingest stage: fields from files, whatever the workers, the files and the deaths."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from universe import Truth, write_camels, write_groups, write_snapshot, write_tng

from galdist.grids import ingest as module
from galdist.grids.ingest import IngestConfig, ingest
from galdist.grids.mass_assignment import assign
from galdist.grids.store import GridStore, open_store
from galdist.simulations.simulation import SimulationError
from hpc import durable, mpi, progress

NAMES = ("matter_counts", "matter_mass", "matter_momentum", "galaxy_counts", "stellar_mass")
ALL_FIELDS = tuple({"name": name} for name in NAMES)
N_MESH = 32


def config(path: Path | None, **given: object) -> IngestConfig:
    values = {"path": path, "n_mesh": N_MESH, "fields": ALL_FIELDS, "chunking": {"chunk": 8}, **given}
    return IngestConfig.model_validate(values)


def fields(store: GridStore) -> dict[str, np.ndarray]:
    return {f"{name}/{field}": store[name].read(field) for name in store for field in store[name].fields}


def assert_same(found: GridStore, expected: GridStore) -> None:
    """Counts to the last bit, masses and momenta to 1e-6."""
    a, b = fields(found), fields(expected)
    assert set(a) == set(b)
    for name in a:
        if "counts" in name:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        else:
            np.testing.assert_allclose(
                a[name], b[name], rtol=1e-6, atol=1e-6 * np.abs(b[name]).max(), err_msg=name
            )
    assert found.statistics["matter_counts"] == expected.statistics["matter_counts"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth]]:
    root = tmp_path_factory.mktemp("camels")
    return root, write_camels(root, n_simulations=3, n_chunks=5, n_particles=20_000, masses="field")


@pytest.fixture(scope="module")
def one_worker(tree: tuple[Path, dict[str, Truth]], tmp_path_factory: pytest.TempPathFactory) -> GridStore:
    out = tmp_path_factory.mktemp("one")
    ingest(config(tree[0], split={"validation": ["CV_1"], "test": [2]}), {}, out)
    return open_store(out / "grids.zarr")


def test_fields_are_those_of_the_particles(
    one_worker: GridStore, tree: tuple[Path, dict[str, Truth]]
) -> None:
    for name, truth in tree[1].items():
        grids = one_worker[name]
        counts = assign(truth.position, 25.0, N_MESH)
        np.testing.assert_allclose(grids.read("matter_counts"), counts, rtol=1e-5, atol=1e-5)
        assert grids.read("matter_counts").sum(dtype="f8") == pytest.approx(20_000, rel=1e-6)
        assert grids.read("matter_mass").sum(dtype="f8") == pytest.approx(truth.mass.sum(), rel=1e-6)
        momentum = (truth.mass[:, None] * truth.velocity).sum(axis=0)
        found = grids.read("matter_momentum").sum(axis=(1, 2, 3), dtype="f8")
        np.testing.assert_allclose(
            found, momentum, atol=1e-6 * np.abs(truth.mass[:, None] * truth.velocity).sum()
        )
        galaxies = truth.stellar_mass >= 1.3e8
        expected = assign(truth.galaxy_position[galaxies].astype("f4"), 25.0, N_MESH, "ngp")
        np.testing.assert_array_equal(grids.read("galaxy_counts"), expected)
        assert grids.read("stellar_mass").sum(dtype="f8") == pytest.approx(
            truth.stellar_mass[galaxies].sum(), rel=1e-6
        )
        assert grids.field("galaxy_counts").assignment == "ngp"
        assert grids.field("matter_momentum").units == "Msun/h km/s"


def test_metadata_and_sources(one_worker: GridStore, tree: tuple[Path, dict[str, Truth]]) -> None:
    assert one_worker.names("train") == ["MockA_CV_0"]
    assert one_worker.names("validation") == ["MockA_CV_1"]
    assert one_worker.names("test") == ["MockA_CV_2"]
    attrs = one_worker["MockA_CV_1"].attrs
    assert (attrs.box_size, attrs.seed, attrs.astrophysics["A_SN2"]) == (25.0, 5001, 3.1)
    files = [Path(source.file) for source in attrs.sources]
    assert [file.name for file in files] == [f"snapshot_090.{i}.hdf5" for i in range(5)] + ["groups_090.hdf5"]
    digest = subprocess.run(
        ["sha256sum", files[2]], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert attrs.sources[2].sha256 == digest
    assert one_worker.attrs["min_stellar_mass"] == 1.3e8


def test_statistics_are_those_of_the_training_simulations(one_worker: GridStore) -> None:
    for field in NAMES:
        values = one_worker["MockA_CV_0"].read(field).astype("f8")
        found = one_worker.statistics[field]
        assert found.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * values.std())
        assert found.std == pytest.approx(values.std(), rel=1e-9)
        assert found.max == values.max()
        assert found.nonzero_fraction == np.count_nonzero(values) / values.size


def test_nothing_is_left_behind_but_the_store_and_the_report(one_worker: GridStore) -> None:
    assert sorted(p.name for p in one_worker.path.parent.iterdir()) == ["dask-report.html", "grids.zarr"]
    assert "bokeh" in (one_worker.path.parent / "dask-report.html").read_text().lower()


@pytest.mark.parametrize(("n_workers", "n_chunks", "part"), [(2, 1, None), (1, 3, 1000), (2, 4, None)])
def test_workers_and_files_do_not_change_the_result(
    one_worker: GridStore,
    tree: tuple[Path, dict[str, Truth]],
    n_workers: int,
    n_chunks: int,
    part: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "camels"
    write_camels(root, n_simulations=3, n_chunks=n_chunks, n_particles=20_000, masses="field")
    monkeypatch.setenv(mpi.VARIABLE, str(n_workers))
    if part is not None:  # one worker runs in this process
        monkeypatch.setattr(module, "_PART", part)
    ingest(config(root, split={"validation": ["CV_1"], "test": [2]}), {}, tmp_path / "out")
    assert_same(open_store(tmp_path / "out" / "grids.zarr"), one_worker)


@pytest.mark.parametrize("chunking", [{"chunk": 16}, {"chunk": 64}, {"chunk": 8, "shard": 16}])
def test_chunks_do_not_change_the_result(
    one_worker: GridStore, tree: tuple[Path, dict[str, Truth]], chunking: dict, tmp_path: Path
) -> None:
    ingest(config(tree[0], split={"validation": ["CV_1"], "test": [2]}, chunking=chunking), {}, tmp_path)
    a, b = fields(open_store(tmp_path / "grids.zarr")), fields(one_worker)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("scheme", ["ngp", "cic", "tsc"])
def test_every_scheme_across_slabs(scheme: str, tree: tuple[Path, dict[str, Truth]], tmp_path: Path) -> None:
    chosen = [{"name": "matter_counts", "assignment": scheme}]
    ingest(config(tree[0], fields=chosen, chunking={"chunk": 4}, checksums=False), {}, tmp_path)
    store = open_store(tmp_path / "grids.zarr")
    truth = tree[1]["MockA_CV_0"]
    expected = assign(truth.position, 25.0, N_MESH, scheme)
    np.testing.assert_allclose(store["MockA_CV_0"].read("matter_counts"), expected, rtol=1e-4, atol=1e-4)
    assert store["MockA_CV_0"].read("matter_counts").sum(dtype="f8") == pytest.approx(20_000, rel=1e-6)
    assert store["MockA_CV_0"].attrs.sources[0].sha256 is None


def test_tng_files(tmp_path: Path) -> None:
    truth = write_tng(tmp_path / "tng")
    ingest(config(tmp_path / "tng", format="tng"), {}, tmp_path / "out")
    store = open_store(tmp_path / "out" / "grids.zarr")
    found = store["TNG10-1"].read("matter_counts")
    np.testing.assert_allclose(found, assign(truth.position, 25.0, N_MESH), rtol=1e-5, atol=1e-5)


def test_reads_the_step_before(tree: tuple[Path, dict[str, Truth]], tmp_path: Path) -> None:
    chosen = config(None, fields=[{"name": "galaxy_counts"}])
    ingest(chosen, {"simulations": [tree[0]]}, tmp_path)
    assert len(open_store(tmp_path / "grids.zarr")) == 3


# --- killed and continued ---------------------------------------------------------------------------------


PROGRAM = """
import json, sys
from pathlib import Path
from galdist.grids.ingest import IngestConfig, ingest

if __name__ == "__main__":
    config = IngestConfig.model_validate(json.loads(sys.argv[1]))
    ingest(config, {}, Path(sys.argv[2]))
"""


def start(chosen: IngestConfig, out: Path, n_workers: int) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    program = out.parent / "program.py"
    program.write_text(PROGRAM)
    arguments = [sys.executable, str(program), chosen.model_dump_json(), str(out)]
    environment = {
        **os.environ,
        mpi.VARIABLE: str(n_workers),
        progress.VARIABLE: str(out / "progress.json"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return subprocess.Popen(arguments, env=environment)


def wait_for_marks(out: Path, process: subprocess.Popen, pattern: str, n: int) -> list[Path]:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if len(marks := list((out / ".ingest").glob(pattern))) >= n:
            return marks
        time.sleep(0.005)
    raise AssertionError(f"{process.poll()=}, no {n} of {pattern}")


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the process and to all that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(timeout=10)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=10)


@pytest.mark.parametrize("pattern", ["*/particles.*.json", "*/*.slab*.json"])
def test_killed_ingest_continues_with_what_is_missing(
    pattern: str, one_worker: GridStore, tree: tuple[Path, dict[str, Truth]], tmp_path: Path
) -> None:
    chosen, out = config(tree[0], split={"validation": ["CV_1"], "test": [2]}), tmp_path / "out"
    process = start(chosen, out, 2)
    wait_for_marks(out, process, pattern, 3)
    kill_tree(process)
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (out / ".ingest").glob("*/*.json")}
    assert before
    # A file that was not finished, as a process that dies in the middle of a chunk leaves it.
    slabs = {p.relative_to(out / ".ingest").parts for p in before if "slab" in p.name}
    chunk = next((out / "grids.zarr").glob("*/matter_counts/c/3/0/0"), None)
    if chunk is not None and (chunk.parents[4].name, "particles.slab3.json") not in slabs:
        chunk.write_bytes(chunk.read_bytes()[:10])

    made: dict[Path, int] = {}
    process = start(chosen, out, 2)
    while process.poll() is None:
        for path in before:
            try:
                made[path] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
        time.sleep(0.005)
    assert process.returncode == 0
    painted = [path for path in before if "slab" in path.name]
    assert all(made.get(path, before[path]) == before[path] for path in painted), (
        "done slabs are not made again"
    )
    assert_same(open_store(out / "grids.zarr"), one_worker)
    assert durable.read_json(out / "progress.json")["done"] > 0


def test_what_was_scattered_and_cut_off_is_not_painted(
    tree: tuple[Path, dict[str, Truth]], tmp_path: Path
) -> None:
    chosen, out = config(tree[0]), tmp_path / "out"
    process = start(chosen, out, 1)
    (mark, *_) = wait_for_marks(out, process, "*/particles.*.json", 1)
    kill_tree(process)
    scattered = mark.with_suffix(".bin")
    scattered.write_bytes(scattered.read_bytes()[:-1000])
    process = start(chosen, out, 1)
    assert process.wait(timeout=300) == 1
    shutil.rmtree(out / ".ingest")  # as the message says
    process = start(chosen, out, 1)
    assert process.wait(timeout=300) == 0


def test_killed_worker_does_not_change_the_result(
    one_worker: GridStore, tree: tuple[Path, dict[str, Truth]], tmp_path: Path
) -> None:
    chosen, out = config(tree[0], split={"validation": ["CV_1"], "test": [2]}), tmp_path / "out"
    process = start(chosen, out, 2)
    wait_for_marks(out, process, "*/*.json", 2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    assert process.wait(timeout=300) == 0
    assert_same(open_store(out / "grids.zarr"), one_worker)


def test_a_store_whose_creation_was_cut_short_is_made_again(
    one_worker: GridStore, tree: tuple[Path, dict[str, Truth]], tmp_path: Path
) -> None:
    (tmp_path / "grids.zarr").mkdir()
    marks = tmp_path / ".ingest" / "MockA_CV_0"
    marks.mkdir(parents=True)
    for slab in range(4):
        (marks / f"particles.slab{slab}.json").write_text(json.dumps({}))
    ingest(config(tree[0], split={"validation": ["CV_1"], "test": [2]}), {}, tmp_path)
    assert_same(open_store(tmp_path / "grids.zarr"), one_worker)


# --- memory and disk --------------------------------------------------------------------------------------


def test_memory_of_tasks(tmp_path: Path) -> None:
    """Below twice (the chunk of the snapshot + the chunks of the store that a task writes)."""
    n_mesh, n_particles = 128, 2_000_000
    truths = write_camels(tmp_path / "camels", n_simulations=1, n_particles=n_particles, n_chunks=2)
    chosen = config(tmp_path / "camels", n_mesh=n_mesh, chunking={"chunk": 32}, checksums=False)
    simulations = chosen.open({})
    path, scratch = tmp_path / "grids.zarr", tmp_path / ".ingest"
    module._create(chosen, simulations, path)
    job = module._jobs(chosen, [simulations[0][0]], path, scratch)[0]
    module._scatter(job, 0)  # compiles
    peaks = {}
    for name, task in {
        "scatter": lambda: module._scatter(job, 1),
        "paint": lambda: module._paint(job, 0, []),
    }.items():
        tracemalloc.start()
        task()
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    chunk = max(file.stat().st_size for file in job.files)
    slab = 4 * 32 * n_mesh**2  # of one field: the others come after it
    assert peaks["scatter"] < 2 * chunk
    assert peaks["paint"] < 2 * (chunk + slab)
    assert peaks["paint"] > 2 * slab, "the mesh of float64 was seen"
    assert len(truths) == 1


def test_a_disk_that_is_too_small(
    tree: tuple[Path, dict[str, Truth]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 3 * 7 * 4 * N_MESH**3
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: type("Usage", (), {"free": needed}))
    with pytest.raises(
        durable.NotEnoughSpace, match=r"ingest of 3 simulations needs 0\.01 GB, but only 0\.00"
    ):
        ingest(config(tree[0]), {}, tmp_path)
    assert not list(tmp_path.glob("grids.zarr/*/matter_counts/c"))


# --- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fields": []}, "name at least one of matter_counts"),
        ({"fields": [{"name": "matter_counts"}] * 2}, "each may stand once"),
        ({"n_mesh": 20}, "chunk: 8 does not divide n_mesh = 20"),
        ({"fields": [{"name": "gas"}]}, "matter_counts"),
        ({"format": "tng", "set": "CV"}, "IllustrisTNG has neither"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_configurations(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"test": ["CV_9"]}, r"split\.test.*'CV_9'; did you mean"),
        ({"test": [3]}, r"3 is not one of the 3 simulations"),
        (
            {"test": ["CV_1"], "validation": ["MockA_CV_1"]},
            r"split\.test: MockA_CV_1 is already in validation",
        ),
    ],
)
def test_wrong_splits(split: dict, message: str, tree: tuple[Path, dict[str, Truth]], tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=message):
        ingest(config(tree[0], split=split), {}, tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"split": {"test": 1.0}}, {"CV_0": "test", "CV_1": "test", "CV_2": "test"}),
        (
            {"split": {"validation": 0.3, "test": 0.3}},
            {"CV_0": "validation", "CV_1": "train", "CV_2": "test"},
        ),
        (
            {"split": {"validation": 0.3, "test": ["CV_0"]}},
            {"CV_0": "test", "CV_1": "validation", "CV_2": "train"},
        ),
        # write_camels: A_SN1 is 1.0, 1.1, 1.2 and A_AGN1 2.0, 2.1, 2.2
        ({"where": {"A_SN1": [1.1, None]}, "split": {"test": [1]}}, {"CV_1": "train", "CV_2": "test"}),
        ({"where": {"A_SN1": [None, 1.1]}}, {"CV_0": "train"}),
        ({"where": {"A_SN1": [1.05, 1.3], "A_AGN1": [2.0, 2.15], "Omega_m": [0.1, 0.5]}}, {"CV_1": "train"}),
    ],
)
def test_selections(given: dict, expected: dict, tree: tuple[Path, dict[str, Truth]]) -> None:
    opened = config(tree[0], **given).open({})
    assert {one.name.removeprefix("MockA_"): split for one, split in opened} == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"A_SN": [0, 1]}, "A_SN.; did you mean"),
        ({"A_SN1": [7, None]}, "no simulation has parameters in"),
    ],
)
def test_wrong_selections(where: dict, message: str, tree: tuple[Path, dict[str, Truth]]) -> None:
    with pytest.raises(SimulationError, match=message):
        config(tree[0], where=where).open({})


def test_files_must_come_from_one_place(tree: tuple[Path, dict[str, Truth]], tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="got both"):
        ingest(config(tree[0]), {"simulations": [tree[0]]}, tmp_path)
    with pytest.raises(SimulationError, match="got neither"):
        ingest(config(None), {}, tmp_path)


def test_a_damaged_file_ends_the_ingest_with_its_name(tmp_path: Path) -> None:
    root = tmp_path / "camels"
    write_camels(root, n_simulations=1, n_chunks=2)
    files = sorted(root.rglob("snapshot_090.1.hdf5"))
    files[0].write_bytes(files[0].read_bytes()[:5000])
    with pytest.raises(SimulationError, match=r"snapshot_090\.1\.hdf5: cannot be read as HDF5"):
        ingest(config(root), {}, tmp_path / "out")


def test_chunks_that_do_not_add_up(tmp_path: Path) -> None:
    root = tmp_path / "camels"
    truth = write_camels(root, n_simulations=1, n_chunks=2)["MockA_CV_0"]
    folder = root / "Sims" / "MockA_DM" / "L25n16" / "CV" / "CV_0"
    other = write_snapshot(tmp_path / "other", Truth(**{**vars(truth), "position": truth.position[:4000]}), 2)
    (folder / "snapdir_090" / "snapshot_090.1.hdf5").write_bytes(other[1].read_bytes())
    with pytest.raises(SimulationError, match=r"particles in 2 files, Header/NumPart_Total of .* says 4096"):
        ingest(config(root), {}, tmp_path / "out")


def test_galaxies_without_a_catalog(tmp_path: Path) -> None:
    root = tmp_path / "camels"
    truth = write_camels(root, n_simulations=1)["MockA_CV_0"]
    groups = next((root / "FOF_Subfind" / "MockA").rglob("groups_090.hdf5"))
    groups.unlink()
    with pytest.raises(SimulationError, match="no group catalogue with galaxies"):
        ingest(config(root), {}, tmp_path / "out")
    write_groups(groups.parent, truth)
    ingest(config(root, min_stellar_mass=1e20), {}, tmp_path / "none")
    counts = open_store(tmp_path / "none" / "grids.zarr")["MockA_CV_0"].read("galaxy_counts")
    assert not counts.any(), "a box may hold no galaxy above the limit"


def test_room_is_asked_for_first(
    tree: tuple[Path, dict[str, Truth]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(durable.NotEnoughSpace, match="ingest of 3 simulations"):
        ingest(config(tree[0]), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
