"""The training loop: one for every model family (stage `train`).

What a family is to the loop is said in `galdist.models.Objective`; what it trains on, in
`galdist.data.datasets`.
"""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Constraint
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from galdist.config import StrictModel
from galdist.data.datasets import CropsConfig, GridData, to_device
from galdist.models import AnyModelConfig, Objective, build
from galdist.statistics.metrics import metric_row, save_metrics
from galdist.training.checkpoint import Checkpoints, load_model, save_model
from hpc import ddp, durable, progress

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"


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


class TrainConfig(StrictModel):
    """Settings of a training run."""

    model: AnyModelConfig
    data: CropsConfig = CropsConfig()
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
    early_stopping: PositiveInt | None = None
    """Epochs without a lower validation loss after which training ends."""
    tile: PositiveInt = 64
    """Side of the tiles in which validation boxes are predicted [cells]."""
    halo: NonNegativeInt | None = None
    """Cells read around such a tile. By default the model's reach, which makes tiles exact."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Time between checkpoints within an epoch; its validation comes between two others."""
    seed: int = 0

    @model_validator(mode="after")
    def _whole_parts(self) -> "TrainConfig":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self


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


def train(config: TrainConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Train a model on the training boxes of grid stores; choose its best epoch on their validation boxes.

    Every rank calls it. Called again on the same folder it continues from the last checkpoint and ends with
    the weights that an uninterrupted run has (bitwise on CPUs with the same number of ranks). SIGTERM and
    SIGINT save a checkpoint at the next step.

    Parameters
    ----------
    config
        settings.
    inputs
        `grids`: steps with a `grids.zarr`; `models`: train steps whose models this one builds on.
    out
        step folder. Gets `model/` (best epoch), `checkpoints/`, `history.jsonl`, `tensorboard/`,
        `metrics.json`.

    Raises
    ------
    ValueError
        where model, data and settings do not fit each other.
    FloatingPointError
        where the loss is no longer a number.
    hpc.ddp.Stopped
        where a signal asked to stop; all is saved.
    """
    with ddp.group() as group, ddp.stop_requests() as stop:
        _Training(config, inputs, out, group, stop).run()


class _Training:
    """The state of a run and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Mapping[str, list[Path]],
        out: Path,
        group: ddp.Group,
        stop: ddp.StopRequest,
    ) -> None:
        self.config, self.out, self.group, self.stop = config, out, group, stop
        torch.manual_seed(config.seed)  # all ranks: the same weights
        parts = [load_model(step)[0] for step in inputs.get("models", [])]
        self.objective: Objective = build(config.model, parts)
        self.data = GridData(config.data, inputs["grids"], self.objective.fields, out / "cache")
        alignment = self.objective.alignment
        for name, cells in (
            ("data.crop", config.data.crop),
            ("tile", config.tile),
            ("n_mesh", self.data.n_mesh),
        ):
            if cells % alignment:
                raise ValueError(
                    f"{name} is {cells}: {config.model.name} with these settings halves its mesh, so it must "
                    f"be a multiple of {alignment}"
                )
        self.sampler = self.data.sampler(group, config.batch_size, config.accumulate, config.seed)

        self.checkpoints = Checkpoints(out / "checkpoints")
        resumed: str | None = group.broadcast(self.checkpoints.latest() if group.is_main else None)
        state = None if resumed is None else self.checkpoints.state(resumed)
        self.position = Position() if state is None else Position(**state["position"])
        self._require_space()
        loader = self.data.loader(self.sampler, config.seed, pin_memory=group.device.type == "cuda")
        # Workers start now, while the model is being made ready.
        self._batches: Callable[[], Iterator[Any]] = lambda: iter(loader)
        self.batches = self._next_batches()

        if resumed is None:
            if group.is_main:  # the others get it with the weights
                self.objective.prepare(self.data.training_fields)
        else:
            self.objective.load_state_dict(self.checkpoints.weights(resumed))
        self.objective.to(group.device)
        if group.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # crops have one shape
        self.wrapped = group.wrap(self.objective)
        self.trainable = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(config.optimizer, self.trainable, group.device)
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
        self.history = self._read_history()
        self.tensorboard: Any = None
        if group.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=self._global_step())

    def run(self) -> None:
        """Train until the last epoch or early stopping, then write the best model."""
        config, position = self.config, self.position
        while position.epoch < config.epochs and not self._stalled():
            self._train_epoch()
            self.batches = self._next_batches()  # workers are busy during validation
            row = self._validate()
            if row["validation_loss"] < position.best_loss:
                position.best_loss, position.best_epoch = row["validation_loss"], position.epoch
                self._save_best()
            self._record(row)
            self.position = position = Position(
                epoch=position.epoch + 1, best_epoch=position.best_epoch, best_loss=position.best_loss
            )
            self._save()
        self._finish()

    def _require_space(self) -> None:
        """Room for the checkpoints that are kept, the one being written, and the best models."""
        weights = sum(tensor.nbytes for tensor in self.objective.state_dict().values())
        moments = 2 * sum(tensor.nbytes for tensor in self.objective.parameters() if tensor.requires_grad)
        copies = 1 if self.config.ema_decay is None else 2
        n_bytes = (Checkpoints.KEPT + 1) * (copies * weights + moments) + 3 * weights
        held = durable.folder_size(self.checkpoints.folder)
        durable.require_space(self.out, n_bytes - held, "checkpoints and the model")

    def _train_epoch(self) -> None:
        config, group, position = self.config, self.group, self.position
        n_steps = self.sampler.steps
        self.wrapped.train()
        losses = torch.zeros((), dtype=torch.float64, device=group.device)
        while position.step < n_steps:
            began = time.perf_counter()
            factor = config.schedule.factor(self._global_step(), n_steps, config.epochs)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = config.optimizer.learning_rate * factor
            for part in range(config.accumulate):
                waiting = time.perf_counter()
                batch = to_device(next(self.batches), group.device)
                position.waited += time.perf_counter() - waiting
                if part < config.accumulate - 1:
                    with group.accumulating(self.wrapped):
                        losses += self._backward(batch)
                else:
                    losses += self._backward(batch)
            norm = nn.utils.clip_grad_norm_(self.trainable, config.clip_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update_parameters(self.objective)
            position.step += 1
            position.seconds += time.perf_counter() - began
            self._report(losses, norm)
            due = group.is_main and time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
            stop, save = group.any(bool(self.stop), due)
            save = save or position.step == n_steps  # validation does not stop for a signal
            if stop or save:
                self._add_losses(losses)
                self._save()
            if stop:
                raise ddp.Stopped(self.stop.signum)

    def _backward(self, batch: dict[str, Any]) -> Tensor:
        with self._autocast():
            loss: Tensor = self.wrapped(batch)["loss"] / self.config.accumulate
        loss.backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _add_losses(self, losses: Tensor) -> None:
        """Move what this rank's losses add up to into the position, as the mean over ranks."""
        self.position.loss += self.group.mean({"loss": losses})["loss"].item()
        losses.zero_()
        if not math.isfinite(self.position.loss):
            raise FloatingPointError(
                f"the training loss is {self.position.loss} in epoch {self.position.epoch}: lower "
                "optimizer.learning_rate, set clip_norm, or try precision: fp32"
            )

    def _report(self, losses: Tensor, norm: Tensor) -> None:
        if not self.group.is_main:
            return
        position, n_steps = self.position, self.sampler.steps
        progress.report(
            position.epoch + position.step / n_steps,
            self.config.epochs,
            f"epoch {position.epoch + 1}, best validation loss {position.best_loss:.4g}",
        )
        if position.step % max(n_steps // 10, 1) == 0:
            step = self._global_step()
            self.tensorboard.add_scalar("train/loss", (position.loss + losses.item()) / position.step, step)
            self.tensorboard.add_scalar("train/gradient_norm", norm.item(), step)
            self.tensorboard.add_scalar("train/learning_rate", self.optimizer.param_groups[0]["lr"], step)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Metrics of the validation boxes, in a row with those of the epoch."""
        began = time.perf_counter()
        position, group = self.position, self.group
        model = self._validated()
        model.eval()
        sums: dict[str, Tensor] = {}
        halo = model.reach if self.config.halo is None else self.config.halo
        batches = self.data.validation_batches(group, self.config.tile, halo, model.alignment)
        for n, batch in enumerate(batches):
            with self._autocast():
                new, fields = model.evaluate(to_device(batch, group.device))
            sums = {name: sums[name] + value if sums else value for name, value in new.items()}
            if n == 0 and group.is_main:
                self._show(fields)
        shares = [share for share in group.gather({k: v.cpu() for k, v in sums.items()}) if share]
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
        }

    def _show(self, fields: Mapping[str, Tensor]) -> None:
        """Central planes of the predictions as images."""
        for name, field in fields.items():
            if field.ndim == 5:
                plane = field[0, :1, field.shape[2] // 2].float().cpu()
                image = plane / plane.max().clamp(min=1e-12)
                self.tensorboard.add_image(f"validation/{name}", image, self._global_step())

    def _validated(self) -> Objective:
        if self.average is None:
            return self.objective
        assert isinstance(self.average.module, Objective)
        return self.average.module

    def _record(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if not self.group.is_main:
            return
        durable.write_text(self.out / HISTORY, "".join(json.dumps(row) + "\n" for row in self.history))
        for name, value in row.items():
            if name not in ("epoch", "train_loss", "learning_rate"):
                self.tensorboard.add_scalar(f"epoch/{name}", value, self._global_step())
        self.tensorboard.flush()
        log.info("%s", ", ".join(f"{name} {value:.5g}" for name, value in row.items()))

    def _stalled(self) -> bool:
        patience = self.config.early_stopping
        return patience is not None and self.position.epoch - 1 - self.position.best_epoch >= patience

    def _global_step(self) -> int:
        return self.position.epoch * self.sampler.steps + self.position.step

    def _next_batches(self) -> Iterator[Any]:
        """Batches from the position on; workers begin to make them."""
        epoch, step = self.position.epoch, self.position.step
        if step == self.sampler.steps:  # saved after an epoch's last step, before its validation
            epoch, step = epoch + 1, 0
        self.sampler.start_at(epoch, step)
        return self._batches()

    def _save_best(self) -> None:
        if self.group.is_main:
            self.checkpoints.write(_best(self.position), {"weights": self._validated().state_dict()})

    def _save(self) -> None:
        """Write a checkpoint to resume from."""
        random_states = self.group.gather(_random_state())
        if self.group.is_main:
            weights = {"weights": self.objective.state_dict()}
            state: dict[str, Any] = {
                "position": asdict(self.position),
                "optimizer": self.optimizer.state_dict(),
                "random": random_states,
            }
            if self.average is not None:
                weights["ema"] = self.average.module.state_dict()
                state["averaged"] = int(self.average.n_averaged)
            needs = (_best(self.position),) if self.position.best_epoch >= 0 else ()
            self.checkpoints.write(f"step-{self._global_step():08d}", weights, state, needs)
            self.checkpoints.prune()
        self.saved_at = time.monotonic()

    def _restore(self, name: str, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(self.checkpoints.weights(name, "ema"))
            self.average.n_averaged.fill_(state["averaged"])
        if len(state["random"]) == self.group.world_size:
            _set_random_state(state["random"][self.group.rank])
        elif self.group.is_main:
            log.warning(
                "%d ranks continue what %d ranks began: random numbers drawn by the model will differ",
                self.group.world_size,
                len(state["random"]),
            )
        log.info("continues from %s", name)

    def _read_history(self) -> list[dict[str, float]]:
        """Rows of the epochs that are done; those of epochs that will be done again are left out."""
        path = self.out / HISTORY
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["epoch"] < self.position.epoch]

    def _finish(self) -> None:
        if not self.group.is_main:
            return
        best = self.history[self.position.best_epoch]
        weights = self.checkpoints.weights(_best(self.position))
        save_model(self.out / "model", self._validated(), weights, {"epoch": best["epoch"], "metrics": best})
        rows = [
            metric_row(name, "validation", value)
            for name, value in best.items()
            if name not in ("epoch", "seconds", "learning_rate", "samples_per_second", "data_wait_fraction")
        ]
        steady = self.history[1:] or self.history  # workers start in the first epoch
        for name, unit in (("samples_per_second", "1/s"), ("data_wait_fraction", "")):
            rows.append(metric_row(name, "train", float(np.mean([row[name] for row in steady])), unit=unit))
        save_metrics(self.out, rows)
        self.tensorboard.close()
        self.data.cache.remove()


def _best(position: Position) -> str:
    return f"best-{position.best_epoch:06d}"


def _optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    family = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return family(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
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
