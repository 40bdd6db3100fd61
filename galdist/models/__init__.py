"""Model families: the registry, and what a family is to the training loop.

A model family is an *objective*: a module that knows its losses, its predictions and its metrics. The loop
knows nothing else of it. A new family is one file and one line in `MODELS`.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from numpy.typing import NDArray
from pydantic import SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator
from torch import Tensor, nn

from galdist.config import StrictModel
from galdist.grids.store import Field
from galdist.models.samplers import Drawing
from hpc import ddp, rank
from hpc.strict import did_you_mean

Batch = Mapping[str, Any]
TrainingFields = Callable[[str], Iterator[NDArray[Any]]]
"""Gives a field (of boxes) or a column (of tables) of every training simulation, one at a time, anew at every
call."""

MODELS: dict[str, str] = {
    "r2unet-classifier": "galdist.models.r2unet:R2UNetClassifier",
    "r2unet-regressor": "galdist.models.r2unet:R2UNetRegressor",
    "necola": "galdist.models.displacements:Displacements",
    "vdm": "galdist.models.diffusion:VariationalDiffusion",
    "inception-classifier": "galdist.models.inception:InceptionClassifier",
    "inception-regressor": "galdist.models.inception:InceptionRegressor",
    "nn-class": "galdist.models.classes:BinClassifier",
    "voronoi": "galdist.models.classes:VoronoiClassifier",
    "src": "galdist.models.quantiles:SumOfQuantiles",
    "sqr": "galdist.models.quantiles:SimultaneousQuantiles",
    "autoregressive-sqr": "galdist.models.quantiles:AutoregressiveQuantiles",
    "graph-sqr": "galdist.models.graphs:GraphQuantiles",
    "nn-gauss": "galdist.models.densities:GaussRegressor",
    "flow": "galdist.models.densities:Flow",
}


class ModelConfig(StrictModel):
    """Settings of a model family; each family has its own."""

    learns_from: ClassVar[Literal["crops", "rows"]] = "crops"
    """The `kind` of its training data: `galdist.data`."""
    draws_boxes: ClassVar[bool] = False
    """Of grids: whether all voxels of a box are drawn jointly, or predicted each by itself, in any tiles."""

    name: str

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of boxes, or columns of tables, that it is trained on, those of models it holds left out."""
        return ()

    @property
    def drawn(self) -> tuple[str, ...]:
        """Of grids: fields that can be drawn; none where the model gives means only."""
        return ()

    def check_parts(self, parts: Sequence["ModelConfig"]) -> None:
        """Raise ValueError where a model with these settings does not build on trained models with those of
        ``parts``; by default it builds on none."""
        if parts:
            raise ValueError(f"{self.name} builds on no other model, but {len(parts)} were given as `models`")


class Objective(nn.Module, abc.ABC):
    """A model with what it is trained for; a `GridObjective` or a `galdist.models.tables.TableObjective`."""

    Config: ClassVar[type[ModelConfig]]

    config: ModelConfig
    fields: tuple[str, ...]
    """Fields of boxes, or columns of tables, that it is trained on."""
    inputs: tuple[str, ...]
    """Those of them that a prediction reads."""
    parts: tuple["Objective", ...] = ()
    """Trained models that this one holds."""

    @abc.abstractmethod
    def prepare(self, training: TrainingFields) -> None:
        """Take what the training split decides (normalizations, class balance) into buffers."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses, each the mean over the batch; `loss` is the one to minimize."""

    @abc.abstractmethod
    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What `summarize` needs of a batch, as tensors that add over batches and ranks; and its
        predictions, where they can be shown."""

    @abc.abstractmethod
    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of a sample from its sums; `loss` is the one that training minimizes."""

    def calibrate(self, sums: Mapping[str, Tensor]) -> None:
        """Choose on the validation split what is chosen there (a threshold), before it is summarized."""
        del sums

    def description(self) -> dict[str, Any]:
        """Everything but the weights: `from_description` builds the same model from it."""
        return {
            "model": self.config.model_dump(mode="json"),
            "parts": [part.description() for part in self.parts],
        }


class GridObjective(Objective):
    """A model of fields on meshes.

    Batches are those of `galdist.data.datasets`: fields, the `halo` that is context only, `periodic`, and
    `parameters` where the model has any. Losses and metrics count the voxels inside the halo, predictions
    cover them.
    """

    simulation_parameters: tuple[str, ...] = ()
    """Parameters of a simulation that it is conditioned on, in the order of ``batch["parameters"]`` (b, p):
    names of its cosmology or astrophysics, or `redshift`. Like fields they come in units of their own
    (`galdist.models.conditioning` standardizes them), and `prepare` is given those of the training
    simulations by name."""
    outputs: tuple[Field, ...]
    """Fields that `predict` gives."""
    reach: int
    """Cells from a voxel to the furthest input that its prediction depends on: the halo that makes tiles
    exact."""
    alignment: int
    """Origins of tiles are multiples of it."""

    @property
    def drawn(self) -> tuple[Field, ...]:
        """Those of the `outputs` that it draws; none where the model gives means only."""
        return tuple(field for field in self.outputs if field.name in self.config.drawn)

    def build_on(self, part: "GridObjective") -> None:
        """Hold a trained model, frozen, which reads from the same batches."""
        part.requires_grad_(False)
        self.parts = (part,)
        self.inputs = tuple(dict.fromkeys((*self.inputs, *part.inputs)))
        self.fields = tuple(dict.fromkeys((*self.inputs, *self.fields)))
        # All find their own among these by name, those that the part itself holds too.
        self.simulation_parameters = tuple(
            dict.fromkeys((*self.simulation_parameters, *part.simulation_parameters))
        )
        for held in part.modules():
            if isinstance(held, GridObjective):
                held.simulation_parameters = self.simulation_parameters
        self.alignment = max(self.alignment, part.alignment)
        self.reach = max(self.reach, part.reach)

    def crops(self, n_mesh: int, drawing: Drawing) -> int:
        """Crops in which a box of ``n_mesh`` cells a side is drawn, where boxes are drawn jointly
        (`ModelConfig.draws_boxes`).

        Raises
        ------
        ValueError
            where the crops do not cover the box.
        """
        raise NotImplementedError(f"{self.config.name} predicts voxels each by itself")

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Fields named in `outputs`, ``(batch, component, z, y, x)`` without the halo."""
        raise NotImplementedError(f"{self.config.name} draws whole boxes")

    def draw(self, batch: Batch, uniforms: Tensor) -> dict[str, Tensor]:
        """Draws of the fields named in `drawn`, of one component, ``(batch, draw, z, y, x)`` without the
        halo.

        ``uniforms`` are random numbers in [0, 1) of the same shape, float64: one for each voxel of each draw,
        which belongs to the voxel whatever the tile.
        """
        raise NotImplementedError(f"{self.config.name} gives means, of which nothing can be drawn")

    def draw_boxes(
        self, batch: Batch, generator: torch.Generator, drawing: Drawing, group: ddp.Group | None = None
    ) -> Iterator[dict[str, Tensor] | float]:
        """Draw the fields named in `outputs` for whole boxes, where these are drawn jointly
        (`ModelConfig.draws_boxes`).

        Parameters
        ----------
        batch
            whole boxes, on the CPU, where all that is as large as they are stays.
        generator
            of all that is random, on the CPU. With one state it gives one draw.
        drawing
            the sampler, and the crops of the boxes.
        group
            ranks that share the work; all call it with the same arguments.

        Returns
        -------
        after each of many steps, the share that is done; last, the fields ``(batch, component, z, y, x)``.
        """
        raise NotImplementedError(f"{self.config.name} predicts voxels each by itself")


def objective_class(name: str) -> type[Objective]:
    """The family called ``name``.

    Raises
    ------
    ValueError
        where there is none; the message names the nearest.
    """
    if name not in MODELS:
        hint = did_you_mean(str(name), MODELS)
        raise ValueError(f"there is no model {name!r}{hint} There are: {', '.join(MODELS)}")
    return cast("type[Objective]", rank.load(MODELS[name]))


def build(config: ModelConfig, parts: Sequence[Objective] = ()) -> Objective:
    """An untrained model, on top of the trained ``parts`` that its family needs.

    Raises
    ------
    ValueError
        where it does not build on these.
    """
    config.check_parts([part.config for part in parts])
    return objective_class(config.name)(config, tuple(parts))


def from_description(description: Mapping[str, Any]) -> Objective:
    """The model that `Objective.description` describes, without its weights."""
    parts = [from_description(part) for part in description["parts"]]
    return build(_model_config(description["model"]), parts)


def _model_config(value: Any) -> ModelConfig:
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError(f"a model has a name, one of: {', '.join(MODELS)}")
    return objective_class(value["name"]).Config.model_validate(value)


def _validate(value: Any, handler: ValidatorFunctionWrapHandler) -> ModelConfig:
    del handler  # would make the base class of it
    return _model_config(value)


AnyModelConfig = Annotated[SerializeAsAny[ModelConfig], WrapValidator(_validate)]
"""Annotation of a field that holds the settings of any family, chosen by `name`."""
