"""The pipeline: what runs and why, what is kept, what becomes of results that no longer fit."""

import dataclasses
import datetime
import fcntl
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import yaml
from small_stages import STAGES

import galdist
from galdist import config, pipeline, plan, provenance, status
from galdist.status import Forecast, RunView, State, StepView, estimate
from hpc import durable, rank
from hpc.site import Site
from hpc.strict import SettingsError

DEBUG = Site(launcher="debug")  # in this process: fast


def study(**changes: Any) -> dict[str, Any]:
    """a -> b -> d, and c by itself; ``a={"n_pieces": 3}`` changes a's configuration."""
    steps: list[dict[str, Any]] = [
        {"name": "a", "stage": "pieces"},
        {"name": "b", "stage": "pieces", "inputs": {"before": "a"}},
        {"name": "c", "stage": "pieces"},
        {"name": "d", "stage": "pieces", "inputs": {"before": ["b"]}},
    ]
    for step in steps:
        step["config"] = {"n_pieces": 2, **changes.get(step["name"], {})}
    return {"name": "study", "seed": 1, "steps": steps}


def load(tmp_path: Path, data: dict[str, Any]) -> config.Run:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return config.load(str(path), (), STAGES)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """Executes a run file; returns the names of the steps that were computed, in order."""

    def execute(data: dict[str, Any], site: Site = DEBUG, **options: Any) -> list[str]:
        computed: list[str] = []

        def show(view: RunView) -> None:
            computed.extend(
                step.name for step in view.steps if step.state == "done" and step.name not in computed
            )

        pipeline.execute(load(tmp_path, data), tmp_path / "out", site, show, stages=STAGES, **options)
        return computed

    return execute


def plans(tmp_path: Path, data: dict[str, Any], **options: Any) -> dict[str, str]:
    """Step -> why it would run; empty text for a step that would not."""
    steps = plan.plan(load(tmp_path, data), tmp_path / "out", stages=STAGES, **options)
    return {entry.name: entry.why if entry.runs else "" for entry in steps}


def result(tmp_path: Path, name: str) -> str:
    return (tmp_path / "out" / name / "result.txt").read_text()


def test_steps_run_once(run: Callable[..., list[str]], tmp_path: Path) -> None:
    assert plans(tmp_path, study()) == dict.fromkeys("abcd", "new")
    assert not (tmp_path / "out").exists(), "a plan changes nothing"
    assert run(study()) == ["a", "b", "c", "d"]
    assert run(study()) == []
    assert set(plans(tmp_path, study()).values()) == {""}


def test_a_change_computes_what_depends_on_it(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    changed = study(b={"n_pieces": 3})
    assert plans(tmp_path, changed) == {
        "a": "",
        "b": "config changed: n_pieces: 2 -> 3",
        "c": "",
        "d": "input b changed",
    }
    assert run(changed) == ["b", "d"]


def test_settings_that_came_with_a_later_version(tmp_path: Path) -> None:
    """Left at their defaults they are no reason to compute anything again."""
    earlier = STAGES | {
        "pieces": dataclasses.replace(STAGES["pieces"], function="small_stages:earlier_pieces")
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(study()))
    before = config.load(str(tmp_path / "run.yaml"), (), earlier)
    pipeline.execute(before, tmp_path / "out", DEBUG, lambda view: None, stages=earlier)
    assert set(plans(tmp_path, study()).values()) == {""}
    (tmp_path / "out" / "b" / "done.json").unlink()  # as if it had been stopped
    assert plans(tmp_path, study()) == {"a": "", "b": "continues", "c": "", "d": ""}
    pipeline.execute(load(tmp_path, study()), tmp_path / "out", DEBUG, lambda view: None, stages=STAGES)
    assert set(plans(tmp_path, study()).values()) == {""}
    assert plans(tmp_path, study(b={"seconds": 0.01})) == {
        "a": "",
        "b": "config changed: seconds: null -> 0.01",
        "c": "",
        "d": "input b changed",
    }


def test_the_seed_changes_only_stages_that_take_one(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = study(c={"seed": 5})
    data["steps"].append({"name": "e", "stage": "read", "config": {"path": str(Path(__file__).parent)}})
    run(data)
    assert plans(tmp_path, {**data, "seed": 2}) == {
        "a": "config changed: seed: 1 -> 2",
        "b": "config changed: seed: 1 -> 2; input a changed",
        "c": "",
        "d": "config changed: seed: 1 -> 2; input b changed",
        "e": "",
    }


def test_nothing_computed_is_lost(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    first = result(tmp_path, "d")
    run(study(a={"n_pieces": 3}))
    second = result(tmp_path, "d")
    assert first != second
    assert run(study()) == [], "moved back, not computed"
    assert result(tmp_path, "d") == first
    assert run(study(a={"n_pieces": 3})) == []
    assert result(tmp_path, "d") == second
    replaced = [path.name for path in (tmp_path / "out" / ".replaced").iterdir()]
    assert sorted(name[0] for name in replaced) == ["a", "b", "d"]


def test_a_partial_result_continues(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    """Only the missing pieces are made, also after another configuration was there in between."""
    run(study())
    expected = result(tmp_path, "a")
    folder = tmp_path / "out" / "a"
    for name in ("done.json", "result.txt", "piece-1.txt"):
        (folder / name).unlink()
    record = {**durable.read_json(folder / "provenance.json"), "finished": None}
    durable.write_json(folder / "provenance.json", record)
    kept = (folder / "piece-0.txt").stat()
    killed = f"{socket.gethostname().partition('.')[0]}-{2**22 + 1}"  # no process has this number
    (folder / f".result.txt.{killed}.tmp").write_text("half of it")
    assert plans(tmp_path, study())["a"] == "continues"
    assert run(study(a={"n_pieces": 5})) == ["a", "b", "d"]
    assert plans(tmp_path, study())["a"] == "continues; moved back"
    assert run(study()) == ["a"], "b and d fit again too"
    assert result(tmp_path, "a") == expected
    assert (folder / "piece-0.txt").stat().st_ino == kept.st_ino
    assert (folder / "piece-0.txt").stat().st_mtime_ns == kept.st_mtime_ns
    assert not list(folder.glob(".*.tmp"))


def test_resources_and_names_of_other_steps_are_no_reason(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    run(study())
    data = study()
    data["steps"][0]["resources"] = {"cpus": 1}
    data["steps"][0]["expected"] = 3
    data["steps"].append({"name": "new", "stage": "pieces"})
    assert [name for name, why in plans(tmp_path, data).items() if why] == ["new"]


def test_names_of_inputs_are_a_reason(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Results name the steps they were made from: labels of spectra, for example."""
    run(study())
    data = study()
    data["steps"][0]["name"] = "other"
    data["steps"][1]["inputs"] = {"before": "other"}
    assert plans(tmp_path, data)["b"] == "input other added; input a removed"


def test_from(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    before = result(tmp_path, "d")
    assert plans(tmp_path, study(), start_from="b") == {
        "a": "",
        "b": "asked for with --from",
        "c": "",
        "d": "follows b",
    }
    assert run(study(), start_from="b") == ["b", "d"]
    assert result(tmp_path, "d") == before
    replaced = sorted(path.name for path in (tmp_path / "out" / ".replaced").iterdir())
    assert [name[0] + name[-2:] for name in replaced] == ["b.1", "d.1"], "kept, but not as what to move back"
    assert run(study()) == []
    (tmp_path / "out" / ".replaced" / "b-unknown.1").mkdir()  # what no step made
    kept = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").iterdir() if path.name in "bd"}
    assert run(study(), start_from="b") == ["b", "d"]
    assert run(study(d={"n_pieces": 3}), start_from="d") == ["d"]
    copies = [path for path in (tmp_path / "out" / ".replaced").iterdir() if path.name != "b-unknown.1"]
    assert len([path for path in copies if path.suffix]) == 2, "one of each step"
    assert kept["b"] in {path.stat().st_ino for path in copies}, "the latest"
    assert (tmp_path / "out" / ".replaced" / "b-unknown.1").exists()


def test_only(run: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"b: reads a, which is not done \(new\)"):
        run(study(), only=["b"])
    assert run(study(), only=["a"]) == ["a"]
    assert run(study(), only=["b"]) == ["b"]
    assert run(study(), only=["b"]) == []
    assert run(study(), only=["b"], start_from="b") == ["b"]
    with pytest.raises(SettingsError, match=r"--only: there is no step 'e'"):
        run(study(), only=["e"])


def test_only_several(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """One of them may read another that is to run, not one that is left out."""
    assert run(study(), only=["b", "a"]) == ["a", "b"]
    run(study())
    changed = study(a={"n_pieces": 3})
    assert plans(tmp_path, changed, only=["a", "b"]) == {
        "a": "config changed: n_pieces: 2 -> 3",
        "b": "input a changed",
        "c": "",
        "d": "",
    }
    with pytest.raises(SettingsError) as caught:
        plans(tmp_path, changed, only=["b", "d"])
    assert str(caught.value) == "run study: b: reads a, which is not done (config changed: n_pieces: 2 -> 3)"
    with pytest.raises(SettingsError, match=r"run study: d: reads b, which is not done \(input a changed\)"):
        plans(tmp_path, changed, only=["d", "c"])
    assert run(changed, only=["a", "b"]) == ["a", "b"]
    assert run(study(), only=["b"]) == [], "moved back, with what it reads"
    assert plans(tmp_path, study()) == dict.fromkeys("abcd", "")


def swept() -> dict[str, Any]:
    steps = [
        {"name": "a", "stage": "pieces", "config": {"n_pieces": 2}},
        {"name": "b", "stage": "pieces", "inputs": {"before": "a"}, "sweep": {"seed": [1, 2]}, "at_once": 1},
        {"name": "c", "stage": "one", "inputs": {"source": "b"}, "sweep": "b"},
        {"name": "d", "stage": "many", "inputs": {"sources": "*"}},
    ]
    return {"name": "swept", "seed": 1, "steps": steps}


def test_a_sweep(run: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run(swept()) == ["a", "b-seed1", "b-seed2", "c-seed1", "c-seed2", "d"]
    assert result(tmp_path, "c-seed1") != result(tmp_path, "c-seed2")
    plain = swept()
    plain["steps"][1:3] = [
        {"name": f"{name}-seed{seed}", "stage": stage, "inputs": {role: reads}, "config": {"seed": seed}}
        for seed in (1, 2)
        for name, stage, role, reads in (
            ("b", "pieces", "before", "a"),
            ("c", "one", "source", f"b-seed{seed}"),
        )
    ]
    more = swept()
    more["steps"][1]["sweep"] = {"seed": [1, 2, 3]}
    assert [name for name, why in plans(tmp_path, more).items() if why] == ["b-seed3", "c-seed3", "d"]
    kept = {name for name, why in plans(tmp_path, plain).items() if not why}
    assert kept >= {"a", "b-seed1", "b-seed2", "c-seed1", "c-seed2"}, "members are steps like any other"


def test_a_swept_step_by_its_name(run: Callable[..., list[str]], tmp_path: Path) -> None:
    assert run(swept(), only=["a", "b"]) == ["a", "b-seed1", "b-seed2"]
    assert run(swept(), only=["c-seed2"]) == ["c-seed2"]
    run(swept())
    assert run(swept(), start_from="c") == ["c-seed1", "c-seed2", "d"]
    assert run(swept(), start_from="b-seed1") == ["b-seed1", "c-seed1", "d"]
    with pytest.raises(SettingsError, match=r"--from: there is no step 'cc'; did you mean c\?"):
        run(swept(), start_from="cc")


def test_only_leaves_other_steps_alone(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    run(study(b={"n_pieces": 3}))
    changed = result(tmp_path, "d")
    assert run(study(), only=["c"]) == []
    assert result(tmp_path, "d") == changed, "b and d are not moved back"
    assert run(study(), only=["b"]) == []


def test_an_error_of_the_caller_ends_the_job(tmp_path: Path) -> None:
    """A display that fails (its terminal is gone): nothing runs on unseen."""

    def show(view: RunView) -> None:
        if any(step.state == "running" for step in view.steps):
            raise BrokenPipeError

    token = tmp_path / "out" / "a" / ".job" / "spec.json"
    with pytest.raises(BrokenPipeError):
        pipeline.execute(
            load(tmp_path, study(a={"seconds": 30})), tmp_path / "out", Site(), show, stages=STAGES
        )
    left = [p for p in psutil.process_iter() if rank._belongs(p, durable.read_json(token)["token"])]
    assert left == []
    assert status.steps_of(tmp_path / "out")[0].state == "stopped"


def test_a_failure_stops_only_what_depends_on_it(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = study()
    data["steps"][1] = {"name": "b", "stage": "fail", "inputs": {"before": "a"}}
    with pytest.raises(pipeline.StepFailed) as caught:
        run(data, site=Site())
    text = str(caught.value)
    assert "step b failed after" in text
    assert "ValueError: snapshot.hdf5: PartType1/Coordinates is missing" in text
    assert f"last lines of {tmp_path}/out/b/log.txt:" in text
    states = {step.name: (step.state, step.detail) for step in status.steps_of(tmp_path / "out")}
    assert {name: state for name, (state, _) in states.items()} == {
        "a": "done",
        "b": "failed",
        "c": "done",
        "d": "pending",
    }
    assert states["b"][1] == "ValueError: snapshot.hdf5: PartType1/Coordinates is missing"
    assert plans(tmp_path, data)["b"] == "failed before"
    data["steps"][1] = study()["steps"][1]
    assert run(data) == ["b", "d"]


def test_every_runtime_gives_the_same(run: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    kinds = ["pieces", "dask", "ddp", "mpi"]
    data = {"name": "kinds", "seed": 3, "steps": [{"name": kind, "stage": kind} for kind in kinds]}
    assert run(data, site=Site()) == kinds
    assert len({result(tmp_path, kind) for kind in kinds}) == 1
    memory = durable.read_json(tmp_path / "out" / "mpi" / "provenance.json")["peak_memory"]
    assert set(memory) == {"rank 0", "rank 1"}
    assert all(10e6 < peak < 2e9 for peak in memory.values())
    log = (tmp_path / "out" / "dask" / "log.txt").read_text()
    assert "2 Dask workers" in log


def test_provenance(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    record = durable.read_json(tmp_path / "out" / "b" / "provenance.json")
    steps = {
        entry.name: entry for entry in plan.plan(load(tmp_path, study()), tmp_path / "out", stages=STAGES)
    }
    assert record["fingerprint"] == steps["b"].fingerprint
    assert record["inputs"] == {"a": steps["a"].fingerprint}
    assert (record["step"], record["stage"], record["seed"], record["ranks"]) == ("b", "pieces", 1, 1)
    assert record["run_seed"] == 1
    assert record["versions"]["galdist"] == galdist.__version__
    assert record["versions"]["numpy"]
    started, finished = (datetime.datetime.fromisoformat(record[key]) for key in ("started", "finished"))
    assert (finished - started).total_seconds() == pytest.approx(record["seconds"], abs=0.5)
    assert yaml.safe_load((tmp_path / "out" / "b" / "config.yaml").read_text()) == {
        "seed": 1,
        "n_pieces": 2,
        "seconds": 0.0,
    }
    resolved = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert resolved["steps"][1]["config"]["seed"] == 1


def test_peak_memory_is_the_largest_of_all_attempts(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Also of one that was interrupted; a process of that attempt alone is not forgotten."""

    def stop(view: RunView) -> None:
        if any(step.progress and step.progress.done for step in view.steps):
            raise KeyboardInterrupt

    data = study(a={"seconds": 1.5})
    path = tmp_path / "out" / "a" / "provenance.json"
    with pytest.raises(pipeline.Interrupted):
        pipeline.execute(load(tmp_path, data), tmp_path / "out", Site(), stop, stages=STAGES)
    record = durable.read_json(path)
    assert record["peak_memory"]["rank 0"] > 10e6
    assert (record["finished"], record["error"]) == (None, None)
    durable.write_json(path, {**record, "peak_memory": {"rank 0": 1, "rank 0 process 1": 10**12}})
    assert run(data, site=Site(), only=["a"]) == ["a"]
    peaks = durable.read_json(path)["peak_memory"]
    assert peaks["rank 0"] > 10e6
    assert peaks["rank 0 process 1"] == 10**12


def test_what_a_step_asked_for_and_used(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = study()
    data["steps"][0]["resources"] = {"cpus": 1, "memory": "1 GB"}
    run(data, site=Site(), only=["a"])
    record = durable.read_json(tmp_path / "out" / "a" / "provenance.json")
    asked = {key: value for key, value in record["asked"].items() if value is not None}
    assert asked == {"launcher": "local", "ranks": 1, "cpus": 1, "memory": 2**30}
    assert 0 < record["usage"]["cpu_seconds"] < 60
    assert record["usage"]["elapsed"] == pytest.approx(record["seconds"], abs=2)
    assert record["job"]["id"].startswith("pid ")
    assert (record["running_since"], record["attempts"]) == (None, [])


def test_attempts_are_on_record(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = study()
    data["steps"][0]["stage"] = "fail"
    data["steps"][0]["config"] = {}
    for _ in range(2):
        with pytest.raises(pipeline.StepFailed):
            run(data, site=Site(), only=["a"])
    record = durable.read_json(tmp_path / "out" / "a" / "provenance.json")
    error = "ValueError: snapshot.hdf5: PartType1/Coordinates is missing"
    assert record["error"] == error
    (attempt,) = record["attempts"]
    assert attempt["error"] == error
    assert attempt["started"] < record["started"]
    assert attempt["job"].startswith("pid ")


def test_commit_of_the_source() -> None:
    commit = provenance.git_commit()
    root = Path(galdist.__file__).parents[1]
    if not (root / ".git").exists():
        assert commit is None
    else:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        assert commit is not None
        assert commit.removesuffix("-dirty") == head.stdout.strip()


# What no step made


def with_path(folder: Path, factor: int = 1) -> dict[str, Any]:
    step = {"name": "a", "stage": "read", "config": {"path": str(folder), "factor": factor}}
    return {"name": "x", "steps": [step, {"name": "b", "stage": "pieces", "inputs": {"before": "a"}}]}


def test_external_data(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(SettingsError, match=rf"steps\.a\.config: there is nothing at {data}"):
        run(with_path(data))
    data.mkdir()
    (data / "snapshot.hdf5").write_text("12345")
    assert run(with_path(data)) == ["a", "b"]
    assert run(with_path(data)) == []
    record = durable.read_json(tmp_path / "out" / "a" / "provenance.json")
    assert (record["seed"], record["run_seed"]) == (None, 0), "of a stage that takes no seed"
    (data / "snapshot.hdf5").write_text("123456")
    assert plans(tmp_path, with_path(data)) == {"a": f"{data} changed", "b": "input a changed"}
    assert run(with_path(data)) == ["a", "b"]
    data.rename(tmp_path / "elsewhere")
    assert run(with_path(tmp_path / "elsewhere")) == [], "moved data is the same data"
    (tmp_path / "data").mkdir()


def test_raw_data_may_be_deleted_once_used(run: Callable[..., list[str]], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "snapshot.hdf5").write_text("12345")
    run(with_path(data))
    (data / "snapshot.hdf5").unlink()
    data.rmdir()
    assert run(with_path(data)) == []
    with pytest.raises(SettingsError, match="there is nothing at"):
        run(with_path(data), start_from="a")
    with pytest.raises(SettingsError, match="there is nothing at"):
        run(with_path(data, factor=2))


# Folders and locks


def test_a_foreign_folder_in_the_way_is_moved(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "notes.txt").write_text("mine")
    assert run(study()) == ["a", "b", "c", "d"]
    assert (tmp_path / "out" / ".replaced" / "a-unknown" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "a" / "notes.txt").exists()


def test_a_second_run_in_the_folder_stops(run: Callable[..., list[str]], tmp_path: Path) -> None:
    run(study())
    code = (
        "import fcntl, sys, time\n"
        f"stream = open({str(tmp_path / 'out' / '.lock')!r}, 'a+')\n"
        "fcntl.flock(stream, fcntl.LOCK_EX)\n"
        "stream.write('process 4711 on node1'); stream.flush(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert status.holder(tmp_path / "out") == "process 4711 on node1"
        with pytest.raises(
            pipeline.RunLocked, match=r"in use by another run: process 4711 on node1\. Wait for it"
        ):
            run(study())
    finally:
        other.kill()
        other.communicate()
    assert status.holder(tmp_path / "out") is None
    assert run(study()) == [], "the lock of a killed process is gone with it"


def test_one_who_only_looks_does_not_stop_a_run(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, (stream, fcntl.LOCK_UN)).start()
        with pipeline._lock(tmp_path):
            assert status.holder(tmp_path) is not None


def test_the_lock_is_not_inherited(tmp_path: Path) -> None:
    with pipeline._lock(tmp_path):
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        with open(tmp_path / ".lock") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        left.kill()
        left.wait()


# Status, results, time left


def test_status_and_results(run: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no run here"):
        status.steps_of(tmp_path / "out")
    run(study(), only=["a"])
    run(study(a={"n_pieces": 3}), only=["c"])
    states = {step.name: step for step in status.steps_of(tmp_path / "out")}
    assert {name: step.state for name, step in states.items()} == {
        "a": "stale",
        "b": "pending",
        "c": "done",
        "d": "pending",
    }
    assert states["c"].bytes == pytest.approx(plan_size(tmp_path / "out" / "c"), rel=0.5)
    run(study())
    rows = status.results(tmp_path / "out")
    assert [(row["step"], row["metric"]) for row in rows] == [(name, "total") for name in "abcd"]
    assert rows[0]["value"] == float(result(tmp_path, "a"))


def test_status_of_a_run_killed_between_its_two_files(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """run.yaml is of the new run file, the plan still of the old one."""
    run(study())
    data = study()
    data["steps"][0]["name"] = data["steps"][1]["inputs"]["before"] = "new"
    durable.write_text(tmp_path / "out" / "run.yaml", load(tmp_path, data).to_yaml())
    states = {step.name: step.state for step in status.steps_of(tmp_path / "out")}
    assert states == {"new": "pending", "b": "done", "c": "done", "d": "done"}


def plan_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_seen_from_outside(tmp_path: Path) -> None:
    """What another process sees while the run goes on, and when it has stopped."""
    data = study(b={"seconds": 0.3, "n_pieces": 6})
    seen: list[dict[str, StepView]] = []

    def show(view: RunView) -> None:
        if any(step.progress and step.progress.done >= 2 for step in view.steps if step.name == "b"):
            outside = status.view(tmp_path / "out")
            assert (outside.name, outside.folder) == ("study", tmp_path / "out")
            seen.append({step.name: step for step in outside.steps})
            raise KeyboardInterrupt

    with pytest.raises(pipeline.Interrupted):
        pipeline.execute(load(tmp_path, data), tmp_path / "out", Site(), show, stages=STAGES)
    assert {name: step.state for name, step in seen[0].items()} == {
        "a": "done",
        "b": "running",
        "c": "pending",
        "d": "pending",
    }
    b = seen[0]["b"]
    assert b.progress is not None
    assert b.progress.total == 6
    assert b.detail == "33% pieces"
    assert b.seconds_left == pytest.approx(1.2, abs=0.8)
    assert 0.3 < b.seconds < 10
    assert b.job is not None
    assert b.job.id.startswith("pid ")
    stopped = {step.name: step for step in status.view(tmp_path / "out").steps}
    assert (stopped["b"].state, stopped["b"].progress) == ("stopped", None)
    with pytest.raises(SettingsError, match="there is no run here"):
        status.view(tmp_path / "nowhere")


def views(*steps: tuple[str, str, float]) -> list[StepView]:
    return [StepView(name, "x", cast("State", state), seconds=seconds) for name, state, seconds in steps]


def test_time_left_of_steps_that_run_at_the_same_time() -> None:
    """The longest chain; with little room, the work shared out."""
    forecasts = {
        "a": Forecast((), None, 10.0),
        "b": Forecast(("a",), None, 20.0),
        "c": Forecast((), None, 25.0),
        "d": Forecast(("b", "c"), None, 5.0),
    }
    steps = views(("a", "running", 4.0), ("b", "waiting", 0.0), ("c", "queued", 0.0), ("d", "waiting", 0.0))
    assert estimate(steps, forecasts, None) == 6 + 20 + 5
    assert estimate(steps, forecasts, 1) == 6 + 20 + 25 + 5
    assert estimate(steps, forecasts, 10) == 6 + 20 + 5
    assert [step.seconds_left for step in steps] == [6.0, None, None, None]
    steps = views(("a", "done", 10.0), ("b", "running", 19.0), ("c", "running", 2.0), ("d", "waiting", 0.0))
    assert estimate(steps, forecasts, None) == 23 + 5
    forecasts["c"] = Forecast((), None, None)
    assert estimate(steps, forecasts, None) is None, "nothing is known of one of them"
    assert estimate(views(("a", "done", 10.0)), forecasts, None) is None, "nothing is left"


def test_time_left_by_the_run_files_ratios() -> None:
    forecasts = {"a": Forecast((), 10.0, None), "b": Forecast((), 30.0, None), "c": Forecast((), 5.0, 4.0)}
    steps = views(("a", "done", 20.0), ("b", "running", 15.0), ("c", "waiting", 0.0))
    assert estimate(steps, forecasts, 1) == pytest.approx(45 + 4), "half as fast as the run file says"


def test_time_left(run: Callable[..., list[str]], tmp_path: Path) -> None:
    """From ratios in the run file at first, scaled by what this machine needs; later from measurements."""
    data = study(a={"seconds": 0.25}, b={"seconds": 0.25})
    for step, expected in zip(data["steps"], (10, 10, 20, 40), strict=True):
        step["expected"] = expected
    seen: dict[tuple[str, ...], float | None] = {}

    def show(view: RunView) -> None:
        done = tuple(step.name for step in view.steps if step.state in ("done", "kept"))
        seen.setdefault(done, view.seconds_left)

    pipeline.execute(load(tmp_path, data), tmp_path / "out", DEBUG, show, stages=STAGES)
    took = durable.read_json(tmp_path / "out" / "a" / "provenance.json")["seconds"]
    assert took >= 0.5
    assert seen["a",] == pytest.approx(took * (10 + 20 + 40) / 10, rel=0.2), "a took 0.5 s instead of 10 s"
    entries = {e.name: e for e in plan.plan(load(tmp_path, data), tmp_path / "out", stages=STAGES)}
    assert entries["a"].measured
    assert entries["a"].expected == pytest.approx(took)


def test_time_of_earlier_attempts_counts(tmp_path: Path) -> None:
    now = time.time()
    killed = {"seconds": 0.0, "running_since": now}
    assert provenance.seconds_so_far(tmp_path, killed) == 0.0
    (tmp_path / "progress.json").write_text(json.dumps({"done": 1, "total": 2, "time": now + 40}))
    assert provenance.seconds_so_far(tmp_path, killed) == pytest.approx(40, abs=0.1)
    assert provenance.seconds_so_far(tmp_path, {**killed, "seconds": 12.0}) == pytest.approx(52, abs=0.1)
    assert provenance.seconds_so_far(tmp_path, {"seconds": 12.0, "running_since": None}) == 12.0
    assert provenance.seconds_so_far(tmp_path, {}) == 0.0


def test_a_thousand_steps_are_planned_quickly(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [{"name": "s0", "stage": "pieces"}]
    for number in range(1, 1000):
        names = sorted({f"s{number - 1}", f"s{number // 2}"})
        steps.append({"name": f"s{number}", "stage": "pieces", "inputs": {"before": names}})
    run = load(tmp_path, {"name": "many", "steps": steps})
    started = time.process_time()
    assert len(plan.plan(run, tmp_path / "out", stages=STAGES)) == 1000
    assert time.process_time() - started < 2


def test_mpi_needs_its_launcher_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Site) -> Path:
        raise FileNotFoundError("no mpirun")

    monkeypatch.setattr(Site, "find_mpirun", missing)
    data = {"name": "x", "steps": [{"name": "a", "stage": "pieces"}, {"name": "b", "stage": "mpi"}]}
    with pytest.raises(SettingsError, match=r"steps\.b: no mpirun"):
        pipeline.execute(load(tmp_path, data), tmp_path / "out", Site(), stages=STAGES)
    assert not (tmp_path / "out").exists()
