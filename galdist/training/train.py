"""The training loop: one for every model family (stage `train`).

What a family is to the loop is said in `galdist.models.Objective`; what it trains on, in `galdist.data`.
"""

import contextlib
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from galdist.config import StrictModel, require
from galdist.data import ROLES, Batch, TrainingData, check_role
from galdist.data.datasets import CropsConfig, to_device
from galdist.data.tables import RowsConfig
from galdist.models import AnyModelConfig, ModelConfig, Objective, build
from galdist.statistics.metrics import metric_row, save_metrics
from galdist.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    grid_facts,
    load_model,
    save_model,
    table_facts,
)
from hpc import ddp, durable, progress

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
_PATIENCE = 0.5  # seconds that a rank waits for data before it asks whether to stop
_CURVES = 1.0  # least seconds between points of the curves within an epoch
_WORTH = 20.0  # times what it takes: time after which another checkpoint is worth it, where none is due

_SPEEDS = {
    "samples_per_second": "1/s",
    "data_wait_fraction": "",
    "device_wait_fraction": "",
    "peak_gpu_memory": "GB",
}
"""What the history says of the machine, and its units; the last two where there are GPUs."""


class OptimizerConfig(StrictModel):
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adam", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0


class ConstantSchedule(StrictModel):
    """The learning rate stays."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Factor of the learning rate at a step counted from the start of training."""
        del step, steps_per_epoch, epochs
        return 1.0


class HalvingSchedule(StrictModel):
    """The learning rate halves every so many epochs."""

    kind: Literal["halving"]
    every: PositiveInt = 4

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Factor of the learning rate at a step counted from the start of training."""
        del epochs
        return float(0.5 ** (step // steps_per_epoch // self.every))


class CosineSchedule(StrictModel):
    """The learning rate rises linearly over the warm-up, then falls as half a cosine to `floor` of its
    peak."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt = 0
    floor: Annotated[float, Constraint(ge=0, lt=1)] = 0.0

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Factor of the learning rate at a step counted from the start of training."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(steps_per_epoch * epochs - self.warmup_steps, 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(through, 1.0)))


Schedule = Annotated[ConstantSchedule | HalvingSchedule | CosineSchedule, Constraint(discriminator="kind")]


def _kind(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Settings of the data that say of which kind they are: where they do not, the model does."""
    if isinstance(value, Mapping) and "kind" not in value:
        if "model" not in info.data:  # which has a problem of its own
            return value
        value = {"kind": info.data["model"].learns_from, **value}
    return handler(value)


Data = Annotated[Annotated[CropsConfig | RowsConfig, Constraint(discriminator="kind")], WrapValidator(_kind)]


class TrainConfig(StrictModel):
    """Settings of a training run."""

    model: AnyModelConfig
    data: Data = Constraint(default_factory=dict, validate_default=True)
    """What it is trained on; `kind` is what the model learns from."""
    epochs: PositiveInt
    batch_size: PositiveInt = 16
    """Samples of an optimizer step, over all ranks: the number of ranks does not change what is learned."""
    accumulate: PositiveInt = 1
    """Parts in which each rank makes its share of a batch, one after the other, to save memory."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = ConstantSchedule()
    clip_norm: PositiveFloat | None = 1.0
    """Bound on the norm of the gradient."""
    ema_decay: Annotated[float, Constraint(gt=0, lt=1)] | None = None
    """Decay a step of the moving average of the weights; where set, the average is what is validated and
    saved."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast: weights and optimizer stay float32."""
    compile: bool = False
    """Compile the losses and their gradient with torch.compile; for models of grids. Needs a compiler (of C++
    on CPUs, Triton on GPUs) and minutes at the start: `galdist bench train` tells what it gains."""
    early_stopping: PositiveInt | None = None
    """Epochs without a lower validation loss after which training ends."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Most time between checkpoints. There is one before and one after an epoch's validation too, but where
    epochs are so short that writing these would take more than a twentieth of the time."""
    keep_checkpoints: Annotated[int, Constraint(ge=2)] = 2
    """How many of the newest checkpoints stay, each with the best weights so far. Two at least: where the
    newest turns out damaged, the one before it is used."""
    seed: int = 0

    @model_validator(mode="after")
    def _whole_parts(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self

    @model_validator(mode="after")
    def _data_for_the_model(self) -> "TrainConfig":
        if self.data.kind != self.model.learns_from:
            raise ValueError(
                f"data.kind is {self.data.kind!r}, but {self.model.name} learns from "
                f"{self.model.learns_from!r}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _shapes_to_compile_for(self) -> "TrainConfig":
        if self.compile and self.data.kind != "crops":
            raise ValueError(
                f"compile is for crops, which have one shape, and {self.model.name} learns from "
                f"{self.data.kind}: leave it out"
            )
        return self

    def check_inputs(self, inputs: Mapping[str, Mapping[str, StrictModel | None]]) -> None:
        """See `galdist.config.ChecksInputs`: grids or catalogs, as the model needs, with what it reads, and
        models that it builds on."""
        role = ROLES[self.data.kind]
        check_role(role, inputs, self.model.name)
        require(self.model.reads, inputs[role])
        models = inputs.get("models", {})
        parts = learned(models)
        if len(parts) == len(models):  # others have mistakes of their own
            self.model.check_parts(list(parts.values()))
            for part in parts.values():
                require(part.reads, inputs[role])


def learned(steps: Mapping[str, StrictModel | None]) -> dict[str, ModelConfig]:
    """The models that ``steps`` train, by name; steps whose configuration has mistakes, None, are left out.

    Raises
    ------
    ValueError
        for one that trains no model.
    """
    models = {}
    for step, config in steps.items():
        if isinstance(config, TrainConfig):
            models[step] = config.model
        elif config is not None:
            raise ValueError(f"step {step} trains no model: name a step of the stage train")
    return models


@dataclass
class Position:
    """Where training is, and what this epoch has added up so far (over all ranks, where it was saved)."""

    epoch: int = 0
    step: int = 0
    """Steps of the epoch that are done."""
    best_epoch: int = -1
    best_loss: float = math.inf
    loss: float = 0.0
    """Sum of the steps' losses in this epoch."""
    seconds: float = 0.0
    """Of the epoch's steps."""
    waited: float = 0.0
    """Seconds of these in which data were waited for."""
    waited_for_device: float = 0.0
    """Seconds of these in which the GPU was waited for."""
    validated: int = 0
    """Batches of the epoch's validation that are done."""


def train(config: TrainConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Train a model on the training boxes or rows; choose its best epoch on those for validation.

    Every rank calls it. Called again on the same folder it continues from the last checkpoint and ends with
    the weights that an uninterrupted run has (bitwise on CPUs with the same number of ranks). SIGTERM and
    SIGINT save a checkpoint at the next step or batch of a validation. Where the disk is full, a checkpoint
    is tried again when the next one is due, and training goes on.

    Parameters
    ----------
    config
        settings.
    inputs
        `grids`: steps with a `grids.zarr`, for models of grids; `catalogs`: steps with a `catalog.zarr` of
        central galaxies, for models of tables; `models`: train steps whose models this one builds on.
    out
        step folder. Gets `model/` (best epoch), `checkpoints/`, `history.jsonl`, `tensorboard/`,
        `metrics.json`.

    Raises
    ------
    ValueError
        where model, data and settings do not fit each other, or what cannot be compiled shall be.
    FloatingPointError
        where the loss is no longer a number.
    galdist.training.checkpoint.CheckpointError
        where the disk has no room for what must be saved: at a request to stop, and at the end.
    hpc.ddp.Stopped
        where a signal asked to stop; all is saved.
    """
    with ddp.group() as group, ddp.stop_requests() as stop:
        Training(config, inputs, out, group, stop).run()


class Training:
    """The state of a run and its loop: `run` is what `train` does, `pace` some steps of it, to be timed."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Mapping[str, list[Path]],
        out: Path,
        group: ddp.Group,
        stop: ddp.StopRequest,
    ) -> None:
        self.config, self.out, self.group, self.stop = config, out, group, stop
        self.catalogs = inputs.get("catalogs", [])
        torch.manual_seed(config.seed)  # all ranks: the same weights
        parts = [load_model(step)[0] for step in inputs.get("models", [])]
        self.objective: Objective = build(config.model, parts)
        self.data: TrainingData = config.data.open(self.objective, inputs, out / "cache")
        self.grid_facts = grid_facts(self.objective, inputs.get("grids", []))

        self.checkpoints = Checkpoints(out / "checkpoints", config.keep_checkpoints)
        resumed: str | None = group.broadcast(self.checkpoints.latest() if group.is_main else None)
        state = None if resumed is None else self.checkpoints.state(resumed)
        self.position = Position() if state is None else Position(**state["position"])
        self._require_space()
        self.history: list[dict[str, float]] = [] if state is None else state["history"]
        self.best: dict[str, Tensor] = {}  # of the main rank: weights of the best epoch
        self.losses = torch.zeros((), dtype=torch.float64, device=group.device)
        self.rehearsed = group.world_size <= 2  # the sum of two is the same in any order
        self.sums: dict[str, Tensor] = {}  # what this rank's part of the validation adds up to
        self.batches = self.data.batches(group, config.batch_size, config.accumulate, config.seed)
        self._start_batches()  # now: workers start while the model is being made ready

        if resumed is None:
            self._prepare()
        else:
            self.objective.load_state_dict(self.checkpoints.weights(resumed))
        self.objective.to(group.device)
        if group.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # crops have one shape
        self.wrapped = group.wrap(self.objective)
        if config.compile:
            _require_compiler(group.device)
            # In place, which leaves the names of the weights as they are. Crops have one shape.
            self.wrapped.compile(dynamic=False)
        self.trainable = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(config.optimizer, self.trainable)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(self.objective, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        # Each rank: its own noise, for objectives that draw any.
        torch.manual_seed(config.seed + group.rank + 1)
        np.random.seed((config.seed + group.rank + 1) % 2**32)
        random.seed(config.seed + group.rank + 1)
        if resumed is not None and state is not None:
            self._restore(resumed, state)
        self.saved_at = time.monotonic()
        self.saving = 0.0  # seconds that the last checkpoint took
        self.device = _DeviceClock(group.device)
        self.drawn_at = -math.inf
        self.board = _Board(out / "tensorboard" if group.is_main else None, self._global_step())

    def run(self) -> None:
        """Train until the last epoch or early stopping, then write the best model."""
        while not self._is_done():
            self._train_epoch()
            self._start_batches()  # workers are busy during validation
            row = self._validate()
            position = self.position
            if row["validation_loss"] < position.best_loss:
                position.best_loss, position.best_epoch = row["validation_loss"], position.epoch
                if self.group.is_main:
                    weights = self._validated().state_dict()
                    self.best = {name: value.to("cpu", copy=True) for name, value in weights.items()}
            self._record(row)
            self.position = Position(
                epoch=position.epoch + 1, best_epoch=position.best_epoch, best_loss=position.best_loss
            )
            self.sums = {}
            self._save_around_validation(must=self._is_done())
        if self.group.is_main:
            try:
                self._finish()
            except durable.NotEnoughSpace as error:
                raise self._lost(error) from error

    def pace(self, steps: int) -> dict[str, float]:
        """Train so many steps, through as many epochs as that takes, and validate and save nothing.

        What comes back is what the history says of an epoch's speed; every rank calls it.
        """
        position = self.position
        position.seconds = position.waited = position.waited_for_device = 0.0
        self.wrapped.train()
        self.device.start()
        for _ in range(steps):
            if position.step == self.batches.steps:
                position.epoch, position.step = position.epoch + 1, 0
                self._start_batches()
            self._step()
        samples = steps * self.config.batch_size
        return {
            "samples_per_second": samples / position.seconds,
            "data_wait_fraction": position.waited / position.seconds,
            **self._of_the_gpu(),
        }

    def close(self) -> None:
        """Nothing more is trained."""
        self.board.close()
        self.data.close()

    def _prepare(self) -> None:
        """Let the main rank take from the training data what the model needs; `wrap` gives it to the others.

        Between two boxes all ranks agree whether to stop, and so none waits for long.
        """
        if not self.group.is_main:
            while not self._is_prepared(False):
                continue
            return

        def fields(field: str) -> Iterator[NDArray[Any]]:
            for values in self.data.training_fields(field):
                self._is_prepared(False)
                yield values

        self.objective.prepare(fields)
        self._is_prepared(True)

    def _is_prepared(self, done: bool) -> bool:
        stop, done = self.group.any(bool(self.stop), done)
        if stop:
            raise ddp.Stopped(self.stop.signum)
        return done

    def _require_space(self) -> None:
        """Room for the checkpoints that are kept, the one being written, and the best models."""
        weights = sum(tensor.nbytes for tensor in self.objective.state_dict().values())
        moments = 2 * sum(tensor.nbytes for tensor in self.objective.parameters() if tensor.requires_grad)
        copies = 2 if self.config.ema_decay is None else 3  # the best weights are in each
        checkpoint = copies * weights + moments
        held = durable.folder_size(self.checkpoints.folder)
        n_bytes = (self.config.keep_checkpoints + 1) * checkpoint + weights - held
        durable.require_space(self.out, n_bytes, "checkpoints and the model")

    def _train_epoch(self) -> None:
        n_steps = self.batches.steps
        self.wrapped.train()
        self.device.start()
        while self.position.step < n_steps:
            self._step()
            if self.position.step == n_steps:
                self._add_losses()
                self._save_around_validation()

    def _step(self) -> None:
        config, group, position = self.config, self.group, self.position
        batches = self._next_step()
        began = time.perf_counter()
        if not self.rehearsed:
            self._rehearse(batches[-1])
        factor = config.schedule.factor(self._global_step(), self.batches.steps, config.epochs)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = config.optimizer.learning_rate * factor
        for batch in batches[:-1]:
            with group.accumulating(self.wrapped):
                self._backward(batch)
        self._backward(batches[-1])
        norm = nn.utils.clip_grad_norm_(self.trainable, config.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.objective)
        position.step += 1
        position.waited_for_device += self.device.wait()
        position.seconds += time.perf_counter() - began
        self._report(norm)

    def _next_step(self) -> list[Batch]:
        """The batches of the next step, as soon as every rank has its own."""
        position = self.position
        while True:
            began = time.perf_counter()
            ready = self.batches.wait(_PATIENCE)
            arrived = time.perf_counter()
            stop, save, waiting = self._vote(not ready)
            voted = time.perf_counter()
            position.seconds += voted - began
            position.waited += (voted if waiting else arrived) - began
            self._heed(stop, save)
            if not waiting:
                return self.batches.take()

    def _vote(self, waiting: bool = False) -> tuple[bool, ...]:
        """Whether any rank was asked to stop, a checkpoint is due, and any rank waits."""
        due = self.group.is_main and time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        return self.group.any(bool(self.stop), due, waiting)

    def _save_around_validation(self, must: bool = False) -> None:
        """Save before or after a validation, where that is worth its time or ``must`` be."""
        since = time.monotonic() - self.saved_at
        worth = self.group.is_main and since > min(_WORTH * self.saving, 60 * self.config.checkpoint_minutes)
        if any(self.group.any(worth, must)):
            self._save()

    def _heed(self, stop: bool, save: bool) -> None:
        """Save where that is due, and stop where that was asked for."""
        if stop or save:
            self._save(must=stop)
        if stop:
            raise ddp.Stopped(self.stop.signum)

    def _rehearse(self, batch: Batch) -> None:
        """Let DDP see a backward pass that does not count.

        In the order in which the first one makes gradients it arranges them, and with that the order of sums
        over ranks, for all that follow: a resumed training would add otherwise than an uninterrupted one.
        """
        state = _random_state()
        self._backward(batch)
        self.optimizer.zero_grad()
        self.losses.zero_()
        _set_random_state(state)
        self.rehearsed = True

    def _backward(self, batch: Batch) -> None:
        with _compiling() if self.config.compile else contextlib.nullcontext():
            with self._autocast():
                losses = self.wrapped(to_device(batch, self.group.device))
                loss: Tensor = losses["loss"] / self.config.accumulate
            loss.backward()
        self.losses += loss.detach()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.group.device.type, torch.bfloat16)

    def _add_losses(self) -> None:
        """Move what this rank's losses add up to into the position, as the mean over ranks."""
        self.position.loss += self.group.mean({"loss": self.losses})["loss"].item()
        self.losses.zero_()
        if not math.isfinite(self.position.loss):
            raise FloatingPointError(
                f"the training loss is {self.position.loss} in epoch {self.position.epoch}: lower "
                "optimizer.learning_rate, set clip_norm, or try precision: fp32"
            )

    def _report(self, norm: Tensor) -> None:
        if not self.group.is_main:
            return
        position, n_steps = self.position, self.batches.steps
        known = math.isfinite(position.best_loss)
        best = f", best validation loss {position.best_loss:.4g}" if known else ""
        progress.report(
            position.epoch + position.step / n_steps,
            self.config.epochs,
            f"epoch {position.epoch + 1}" + best,
        )
        now = time.monotonic()
        if position.step % max(n_steps // 10, 1) == 0 and now - self.drawn_at > _CURVES:
            self.drawn_at = now
            scalars = {
                "train/loss": (position.loss + self.losses.item()) / position.step,
                "train/gradient_norm": norm.item(),
                "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            }
            self.board.add(self._global_step(), scalars)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Metrics of the validation boxes, in a row with those of the epoch."""
        began = time.perf_counter()
        position, group = self.position, self.group
        model = self._validated()
        model.eval()
        for batch in self.data.validation_batches(group, position.validated):
            if batch is not None:
                with self._autocast():
                    new, fields = model.evaluate(to_device(batch, group.device))
                sums = self.sums
                self.sums = {name: sums[name] + value if sums else value for name, value in new.items()}
                if position.validated == 0 and group.is_main:
                    self._show(fields)
            position.validated += group.world_size
            stop, save, _ = self._vote()
            self._heed(stop, save)
        shares = [share for share in group.gather(_on_cpu(self.sums)) if share]
        total = {name: torch.stack([share[name] for share in shares]).sum(0) for name in shares[0]}
        model.calibrate(total)
        metrics = model.summarize(total)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"the validation loss is {metrics['loss']} after epoch {position.epoch}: lower "
                "optimizer.learning_rate, set clip_norm, or try precision: fp32"
            )
        samples = position.step * self.config.batch_size
        return {
            "epoch": position.epoch,
            "seconds": position.seconds + time.perf_counter() - began,
            "train_loss": position.loss / position.step,
            "validation_loss": metrics.pop("loss"),
            **metrics,
            "samples_per_second": samples / position.seconds,
            "data_wait_fraction": position.waited / position.seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **self._of_the_gpu(),
        }

    def _of_the_gpu(self) -> dict[str, float]:
        """What the history says of GPUs; nothing where there are none."""
        if self.group.device.type != "cuda":
            return {}
        return {
            "device_wait_fraction": self.position.waited_for_device / self.position.seconds,
            "peak_gpu_memory": max(self.group.gather(self.device.peak_memory() / 1e9)),
        }

    def _show(self, fields: Mapping[str, Tensor]) -> None:
        """Central planes of the predictions as images."""
        planes = {
            f"validation/{name}": field[0, :1, field.shape[2] // 2].float().cpu()
            for name, field in fields.items()
            if field.ndim == 5
        }
        images = {name: plane / plane.max().clamp(min=1e-12) for name, plane in planes.items()}
        self.board.add(self._global_step(), images=images)

    def _validated(self) -> Objective:
        if self.average is None:
            return self.objective
        assert isinstance(self.average.module, Objective)
        return self.average.module

    def _record(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if not self.group.is_main:
            return
        with _unless_full(f"the row of epoch {row['epoch']:.0f} in {HISTORY}", self.out):
            self._write_history(sync=False)  # checkpoints hold it too
        curves = {
            f"epoch/{name}": value
            for name, value in row.items()
            if name not in ("epoch", "train_loss", "learning_rate")
        }
        self.board.add(self._global_step(), curves)
        log.info("%s", ", ".join(f"{name} {value:.5g}" for name, value in row.items()))

    def _write_history(self, sync: bool) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        durable.write_text(self.out / HISTORY, text, sync)

    def _is_done(self) -> bool:
        patience, position = self.config.early_stopping, self.position
        stalled = patience is not None and position.epoch - 1 - position.best_epoch >= patience
        return stalled or position.epoch >= self.config.epochs

    def _global_step(self) -> int:
        return self.position.epoch * self.batches.steps + self.position.step

    def _start_batches(self) -> None:
        """Let workers begin to make batches from the position on."""
        epoch, step = self.position.epoch, self.position.step
        if step == self.batches.steps:  # the epoch's last step is done, its validation is not
            epoch, step = epoch + 1, 0
        self.batches.start_at(epoch, step)

    def _save(self, must: bool = False) -> None:
        """Write a checkpoint to resume from; unless it ``must`` succeed, a full disk is a warning."""
        began = time.monotonic()
        self._add_losses()
        ranks = self.group.gather({"random": _random_state(), "sums": _on_cpu(self.sums)})
        if self.group.is_main:
            weights = {"weights": self.objective.state_dict()}
            state: dict[str, Any] = {
                "position": asdict(self.position),
                "optimizer": self.optimizer.state_dict(),
                "ranks": ranks,
                "history": self.history,
            }
            if self.average is not None:
                weights["ema"] = self.average.module.state_dict()
                state["averaged"] = int(self.average.n_averaged)
            if self.best:
                weights["best"] = self.best
            try:
                self.checkpoints.write(self._global_step(), weights, state)
            except durable.NotEnoughSpace as error:
                if must:
                    raise self._lost(error) from error
                log.warning("%s. Training goes on; the next checkpoint is tried when it is due", error)
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - began

    def _lost(self, error: durable.NotEnoughSpace) -> CheckpointError:
        newest = self.checkpoints.latest()
        return CheckpointError(
            f"{error}. Make room there and run the same command again: training then goes on from "
            + (
                f"the last whole checkpoint, {newest} of {self._global_step()} steps"
                if newest
                else "its start"
            )
        )

    def _restore(self, name: str, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(self.checkpoints.weights(name, "ema"))
            self.average.n_averaged.fill_(state["averaged"])
        group, ranks = self.group, state["ranks"]
        if group.is_main:  # copies: what was loaded are maps of the file, which will be removed
            self.best = {key: value.clone() for key, value in self.checkpoints.weights(name, "best").items()}
        sums = [rank["sums"] for rank in ranks]
        if len(ranks) == group.world_size:
            _set_random_state(ranks[group.rank]["random"])
        else:
            done = [share for share in sums if share]
            total = {key: torch.stack([share[key] for share in done]).sum(0) for key in (done or [{}])[0]}
            sums = [total] + [{}] * (group.world_size - 1)
            if group.is_main:
                log.warning(
                    "%d ranks continue what %d ranks began: random numbers drawn by the model will differ",
                    group.world_size,
                    len(ranks),
                )
        self.sums = {key: value.to(group.device) for key, value in sums[group.rank].items()}
        log.info("continues from %s", name)

    def _finish(self) -> None:
        best = self.history[self.position.best_epoch]
        facts = {"epoch": best["epoch"], "metrics": best}
        facts |= {**table_facts(self.objective, self.catalogs), **self.grid_facts}
        save_model(self.out / "model", self._validated(), self.best, facts)
        rows = [
            metric_row(name, "validation", value)
            for name, value in best.items()
            if name not in ("epoch", "seconds", "learning_rate", *_SPEEDS)
        ]
        steady = self.history[1:] or self.history  # workers start in the first epoch
        for name, unit in _SPEEDS.items():
            if name in best:
                rows.append(
                    metric_row(name, "train", float(np.mean([row[name] for row in steady])), unit=unit)
                )
        with durable.room_for("the results", self.out):
            self._write_history(sync=True)
            save_metrics(self.out, rows)
        self.close()


class _DeviceClock:
    """Keeps the host at most one step ahead of a GPU, and knows how long it waited for that; of a CPU, which
    nobody waits for, it knows nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._before: torch.cuda.Event | None = None

    def start(self) -> None:
        """An epoch begins."""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def wait(self) -> float:
        """Wait for the step before the one that was just queued; seconds that it took."""
        if self._device is None:
            return 0.0
        began = time.perf_counter()
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.synchronize()
        self._before = queued
        return time.perf_counter() - began

    def peak_memory(self) -> int:
        """Most memory of the GPU that tensors took at a time since the epoch began [bytes]."""
        return torch.cuda.max_memory_allocated(self._device)


class _Board:
    """TensorBoard's files, on the rank that writes them. A disk that is full ends them, not the training."""

    def __init__(self, folder: Path | None, step: int) -> None:
        """Whatever the files hold of ``step`` and later ones will be done again."""
        self._folder = folder
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            with self._while_there_is_room():
                self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(
        self,
        step: int,
        scalars: Mapping[str, float] | None = None,
        images: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add points of curves and images ``(1, y, x)``."""
        if self._writer is None:
            return
        with self._while_there_is_room():
            for name, value in (scalars or {}).items():
                self._writer.add_scalar(name, value, step)
            for name, image in (images or {}).items():
                self._writer.add_image(name, image, step)
            self._writer.flush()

    def close(self) -> None:
        """Nothing more is added."""
        if self._writer is not None:
            with self._while_there_is_room():
                self._writer.close()

    @contextlib.contextmanager
    def _while_there_is_room(self) -> Iterator[None]:
        assert self._folder is not None
        done = False
        with _unless_full("further curves", self._folder):
            yield
            done = True
        if not done:
            self._writer = None


@contextlib.contextmanager
def _unless_full(what: str, folder: Path) -> Iterator[None]:
    """Inside, a full disk is a warning: ``what`` can be done without, or is written again later."""
    try:
        with durable.room_for(what, folder):
            yield
    except durable.NotEnoughSpace as error:
        log.warning("%s. Training goes on", error)


def _require_compiler(device: torch.device) -> None:
    """Refuse to begin where nothing can be compiled: on every rank, for nodes may differ."""
    with _compiling():
        torch.compile(lambda x: 2 * x.sin())(torch.ones(8, device=device))


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Inside, what cannot be compiled is a `ValueError` that names the setting."""
    from torch._dynamo.exc import TorchDynamoException  # not before: these take seconds
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"compile is true, but torch.compile fails here ({why}): install what it lacks (a C++ compiler "
            "for CPUs, Triton for GPUs), or set compile to false"
        ) from error


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


def _optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    family = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return family(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over all weights: on CPUs a fifth of the time
    )


def _random_state() -> dict[str, Any]:
    """State of every generator that a model may draw from on this rank, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
