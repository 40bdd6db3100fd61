"""How fast a train step is on a machine: some of its steps, with the loop, data and launcher of a run.

What the step reads is taken from the run where it is done already. Where it is not, stand-ins of the same
shape take its place, in real stores: boxes of random counts, and models that were not trained.
"""

import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat
from torch.utils.flop_counter import FlopCounterMode

from galdist.config import Run, Step, StrictModel
from galdist.data import ROLES, share
from galdist.data.datasets import CropsConfig
from galdist.grids.ingest import KINDS
from galdist.grids.store import Field, SimulationAttrs, create_store
from galdist.models import GridObjective, Objective, build
from galdist.plan import DONE
from galdist.stages import STAGES
from galdist.training.checkpoint import load_model, save_model
from galdist.training.train import TrainConfig, Training
from hpc import ddp, durable, launch
from hpc.resources import Resources
from hpc.site import Site
from hpc.strict import Problem, SettingsError, nearest

_RESULT = "speed.json"
_LARGEST = 256  # cells a side of boxes that are made: rates do not change beyond
_WARM = 3  # steps before those that are timed: memory is laid out, kernels are chosen
_GLANCE = 0.1  # seconds between looks at a job

PEAKS: dict[str, tuple[float, float]] = {
    "A100": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "RTX A6000": (154.8, 77.4),
    "H100": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H200": (989.4, 494.7),
    "L40S": (362.0, 183.0),
}
"""Dense peak of GPUs [TFLOP/s], in bf16 and in TF32, which PyTorch's convolutions of float32 run in: NVIDIA's
data sheets, the numbers without sparsity. Of the names that a device's own contains, the longest counts."""


class BenchError(RuntimeError):
    """A benchmark that could not be measured. ``str()`` says why, with the end of its log."""


class SpeedConfig(StrictModel):
    """What `speed` measures."""

    training: TrainConfig
    seconds: PositiveFloat
    """How long."""


@dataclass(frozen=True)
class Speed:
    """How fast a training is on so many ranks."""

    ranks: int
    device: str
    samples: float
    """Training samples [1/s] of all ranks together."""
    flops: float
    """Floating-point operations [1/s] of all ranks: of matrix products, convolutions and attention that
    PyTorch counts, forward and backward, what is computed again for the gradient included."""
    peak: float | None
    """The most that these devices do [1/s]: of CPUs a large matrix product in the same precision, on all
    ranks at once, before or after the steps; of GPUs the data sheet's, None where it is not known."""
    waited: float
    """Share of the time in which data were waited for."""
    memory: float | None
    """Largest memory of a rank [bytes]: of its tensors on a GPU, else of its process."""


def train_step(run: Run, name: str) -> Step:
    """The train step called ``name``.

    Raises
    ------
    hpc.strict.SettingsError
        where there is none; the message names those that there are.
    """
    there = [step.name for step in run.steps.values() if step.stage == "train"]
    if name in there:
        return run.steps[name]
    if name in run.sweeps:
        text = f"{name!r} is swept: choose one of {', '.join(run.sweeps[name].members)}"
    elif name in run.steps:
        text = f"step {name!r} has stage {run.steps[name].stage}, and only training is measured: " + (
            f"choose one of {', '.join(there)}" if there else "this run has no train step"
        )
    else:
        text = f"there is no step {name!r}{nearest(name, [*run.steps, *run.sweeps])}"
    raise SettingsError("--step", [Problem((), text)])


def measure(
    run: Run, name: str, out: Path, site: Site, ranks: Sequence[int], seconds: float, scratch: Path
) -> Iterator[Speed]:
    """Measure a train step on one number of ranks after the other.

    Parameters
    ----------
    out
        folder of the run, whose steps that are done are read.
    ranks
        these numbers; empty: what the step asks for.
    seconds
        how long to measure on each number of ranks.
    scratch
        folder for what is written, which all nodes see; it is left as it was.

    Raises
    ------
    hpc.strict.SettingsError
        for what is not a train step, ranks that cannot share its batches, or tables that are not there.
    BenchError
        where a rank failed.
    """
    step, config = train_step(run, name), run.configs[name]
    assert isinstance(config, TrainConfig)
    ranks = list(ranks) or [step.resources.ranks or STAGES["train"].ranks]
    for number in ranks:
        try:
            share(config.batch_size, config.accumulate, number)
        except ValueError as error:
            raise SettingsError("--ranks", [Problem((), str(error))]) from error
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=scratch) as folder:
        inputs = _inputs(run, name, out, Path(folder))
        if any(Path(folder) in path.parents for path in inputs.get("grids", [])):
            assert isinstance(config.data, CropsConfig)
            # One box stands for all; it must have a batch.
            crops = max(config.data.crops_per_box, config.batch_size)
            data = config.data.model_copy(update={"crops_per_box": crops})
            config = config.model_copy(update={"data": data})
        wanted = SpeedConfig(training=config, seconds=seconds)
        for number in ranks:
            place = Path(folder) / f"{number}-ranks"
            yield _on_ranks(wanted, inputs, place, site, _resources(step.resources, number))
            shutil.rmtree(place)


def _resources(asked: Resources, ranks: int) -> Resources:
    """What a step asks for, with other ranks: on as many nodes, and GPUs of these, as those need."""
    update: dict[str, Any] = {"ranks": ranks, "min_nodes": None}
    if asked.nodes is not None or asked.gpus:
        a_node = asked.layout("ddp", STAGES["train"].ranks).ranks_per_node
        update["nodes"] = -(-ranks // a_node)
        update["gpus"] = asked.gpus and min(asked.gpus, ranks)
    return asked.model_copy(update=update)


def _on_ranks(
    config: SpeedConfig, inputs: dict[str, list[Path]], place: Path, site: Site, resources: Resources
) -> Speed:
    arguments = {
        "function": f"{__name__}:{speed.__name__}",
        "config": config.model_dump(mode="json"),
        "inputs": {role: [str(path.absolute()) for path in paths] for role, paths in inputs.items()},
        "out": str(place.absolute()),
    }
    place.mkdir()
    task = launch.Task("galdist.stages:call", arguments, place, "ddp", resources, "bench-train")
    job = launch.submit(task, site)
    try:
        while (outcome := job.poll()) is None:
            time.sleep(_GLANCE)
    except BaseException:
        job.cancel()
        raise
    if outcome.failures:
        raise BenchError(outcome.describe())
    found = durable.read_json(place / _RESULT)
    if found["memory"] is None:
        found["memory"] = max(outcome.peak_memory.values(), default=None)
    return Speed(**found)


def speed(config: SpeedConfig, inputs: dict[str, list[Path]], out: Path) -> None:
    """Measure a training; every rank calls it. Leaves a `Speed` in ``out``, without the memory of CPUs."""
    with ddp.group() as group, ddp.stop_requests() as stop:
        found = _speed(config, inputs, out, group, stop)
        if group.is_main:
            durable.write_json(out / _RESULT, found)


def _speed(
    config: SpeedConfig, inputs: dict[str, list[Path]], out: Path, group: ddp.Group, stop: ddp.StopRequest
) -> dict[str, Any]:
    training = Training(config.training, inputs, out, group, stop)
    # Compiled or not, the operations are the same; compiled ones cannot be counted.
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        training.pace(1)
    counted = torch.tensor(float(counter.get_total_flops()), dtype=torch.float64)
    per_sample = group.sum({"operations": counted})["operations"].item() / config.training.batch_size
    training.pace(_WARM)
    rate = training.pace(1)["samples_per_second"]
    steps = max(_WARM, math.ceil(config.seconds * rate / config.training.batch_size))
    steps = group.broadcast(steps)
    peaks = [_peak(group, config.training.precision)]
    found = training.pace(steps)
    peaks.append(_peak(group, config.training.precision))
    training.close()
    on_gpu = group.device.type == "cuda"
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} {'thread' if threads == 1 else 'threads'} a rank"
    return {
        "ranks": group.world_size,
        "device": torch.cuda.get_device_name(group.device) if on_gpu else cpu,
        "samples": found["samples_per_second"],
        "flops": found["samples_per_second"] * per_sample,
        "peak": max((peak for peak in peaks if peak is not None), default=None),
        "waited": found["data_wait_fraction"],
        "memory": 1e9 * found["peak_gpu_memory"] if on_gpu else None,
    }


def _peak(group: ddp.Group, precision: str) -> float | None:
    """The most operations a second that all ranks' devices do together, where that is known."""
    if group.device.type == "cuda":
        peak = gpu_peak(torch.cuda.get_device_name(group.device), precision)
        return None if peak is None else peak * group.world_size
    group.barrier()
    mine = torch.tensor(matmul_rate(torch.bfloat16 if precision == "bf16" else torch.float32))
    return group.sum({"rate": mine})["rate"].item()


def gpu_peak(device: str, precision: str) -> float | None:
    """Dense peak of a GPU [1/s] by its name, as `PEAKS` has it; None where that is not known."""
    words = set(re.split("[ -]", device))
    known = max((name for name in PEAKS if words.issuperset(name.split())), key=len, default=None)
    if known is None:
        return None
    return 1e12 * PEAKS[known][0 if precision == "bf16" else 1]


def matmul_rate(dtype: torch.dtype, side: int = 1536, rounds: int = 5) -> float:
    """Operations a second of a product of square matrices on this CPU, the best of some rounds."""
    a = torch.ones((side, side), dtype=dtype)
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _inputs(run: Run, name: str, out: Path, scratch: Path) -> dict[str, list[Path]]:
    """What a train step reads, by role: from the run, or a stand-in in ``scratch``."""
    step, config = run.steps[name], run.configs[name]
    assert isinstance(config, TrainConfig)
    models = [
        out / other if _is_done(out / other) else _untrained(run, other, out, scratch)
        for other in step.inputs.get("models", ())
    ]
    role = ROLES[config.data.kind]
    data = [out / other for other in step.inputs[role]]
    if missing := [path.name for path in data if not _is_done(path)]:
        if role != "grids":
            text = (
                f"learns from tables, and {', '.join(missing)} is not done in {out}: boxes are made up where "
                f"there are none, tables are not. First: galdist run FILE --only {' --only '.join(missing)}"
            )
            raise SettingsError("--step", [Problem((name,), text)])
        objective = _build(config, models)
        assert isinstance(objective, GridObjective)
        meshes = [getattr(run.configs[other], "n_mesh", None) for other in step.inputs[role]]
        data = [_boxes(scratch / f"{name}-grids", objective, config, meshes[0])]
    return {role: data, "models": models}


def _is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def _build(config: TrainConfig, models: Sequence[Path]) -> Objective:
    return build(config.model, [load_model(folder)[0] for folder in models])


def _boxes(folder: Path, objective: GridObjective, config: TrainConfig, n_mesh: int | None) -> Path:
    """A step folder with a box of random counts to train on, and an empty one for the validation, which is
    left out. Their mesh is the real one's where that is known and not too large."""
    assert isinstance(config.data, CropsConfig)
    crop = config.data.crop
    if n_mesh is None or n_mesh > max(_LARGEST, crop):
        n_mesh = max(_LARGEST // crop, 1) * crop
    known = {name: 0.1 * (number + 1) for number, name in enumerate(objective.simulation_parameters)}
    simulations = [
        SimulationAttrs(name=split, box_size=25.0, redshift=0.0, suite="random", split=split, cosmology=known)
        for split in ("train", "validation")
    ]
    components = {str(name): kind.components for name, kind in KINDS.items()}
    fields = [Field(name=name, components=components.get(name, 1)) for name in objective.fields]
    store = create_store(folder / "grids.zarr", simulations, fields, n_mesh)
    random = np.random.default_rng(0)
    for field in fields:
        shape = (*((field.components,) if field.components > 1 else ()), *(n_mesh,) * 3)
        mean = 4.0 if field.name in objective.inputs else 0.05
        store["train"].write(field.name, random.poisson(mean, shape).astype(np.float32))
    return folder


def _untrained(run: Run, name: str, out: Path, scratch: Path) -> Path:
    """A folder with the model of a train step as it is before it is trained."""
    config, folder = run.configs[name], scratch / name
    assert isinstance(config, TrainConfig)
    inputs = _inputs(run, name, out, scratch)
    objective = _build(config, inputs["models"])
    data = config.data.open(objective, inputs, folder / "cache")
    objective.prepare(data.training_fields)
    data.close()
    save_model(folder / "model", objective, objective.state_dict(), {})
    return folder
