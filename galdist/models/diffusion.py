"""Variational diffusion: samples of galaxy fields given the matter, with a bound on their likelihood.

Kingma et al. 2021 (arXiv:2107.00630), in continuous time; on CAMELS: Ono et al. 2024 (arXiv:2403.10648). The
data get noisier with t until nothing is left of them; a network learns their posterior mean given the noisy
ones. From the network alone follow a bound on -ln p(data), which training minimizes, and samples.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Constraint
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from galdist.data.datasets import PARAMETERS, SEED
from galdist.data.transforms import Normalization
from galdist.grids.store import Field
from galdist.models import Batch, GridObjective, ModelConfig, Objective, TrainingFields
from galdist.models.conditioning import ParameterNames
from galdist.models.layers import trim
from galdist.models.noise import LinearConfig, NoiseSchedule, ScheduleConfig, signal_and_noise
from galdist.models.samplers import Crops, Denoiser, Drawing, joint
from galdist.models.unet import Features, UNet
from galdist.models.voxels import InputConfig, RegressorConfig, VoxelRegressor
from hpc import ddp
from hpc.strict import repeated

TERMS = ("prior", "reconstruction", "diffusion")
"""Of the bound."""

_TIMES = 8  # at which a validation looks at each tile
_LEAST = -4.6  # gamma at which the noise is a tenth of a field's standard deviation
_APART = 3.0  # standard deviations of the least noise from a value to where it would be taken for the next
_GOLDEN = 2654435769  # 2^32 over the golden ratio


def bound(
    x: Tensor,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    halo: int = 0,
    in_steps: Sequence[bool] = (),
) -> dict[str, Tensor]:
    """The terms of a bound on -ln p(x) [nats] in every cell, whose sum over cells has the bound as its mean.

    Kingma et al. 2021 (arXiv:2107.00630), eqs. 11 and 17: what the noisiest field still knows of x
    (``prior``), what the least noisy one does not (``reconstruction``, with a Gaussian of its noise as the
    decoder), and what the denoiser misses between them (``diffusion``), looked at in one moment. From the
    last the scatter of the noise's square is taken, whose mean is zero, where it is part of it.

    Parameters
    ----------
    x
        data ``(b, c, *mesh)``.
    denoiser
        posterior mean of x.
    t
        ``(b,)`` in [0, 1], evenly distributed.
    noise
        standard Gaussian, of the shape of ``x``.
    halo
        cells at each face that are left out.
    in_steps
        whether a channel's values lie in steps, by default none: what little noise does not hide is not
        missed.

    Returns
    -------
    each of `TERMS`, ``(b, c, *mesh)`` without the halo. The gradient for the shape of the schedule, which the
    mean does not depend on, is that of the diffusion loss squared: it lowers the variance (appendix I).
    """
    spatial, ones = x.ndim - 2, (1,) * (x.ndim - 1)
    first, span = schedule.first, schedule.span
    s, slope = schedule.shape(t)
    gamma = first + span * s
    alpha, sigma = (a.view(-1, *ones) for a in signal_and_noise(gamma))
    missed = x - denoiser(alpha * x + sigma * noise, gamma)
    x, missed, noise = (trim(field, halo, spatial) for field in (x, missed, noise))
    # Where there is little noise, missed is it, and its square scatters about what is known.
    scatter = alpha.square() * (noise.square() - 1)
    for channel, stepped in enumerate(in_steps):
        if stepped:
            scatter[:, channel] = 0
    snr, speed = torch.exp(-gamma).view(-1, *ones), (span * slope).view(-1, *ones)
    diffusion = 0.5 * speed * (snr * missed.square() - scatter)
    if s.requires_grad:
        twice = 2 * diffusion.detach().flatten(1).mean(1)
        s.register_hook(lambda gradient: gradient * twice)
        slope.register_hook(lambda gradient: gradient * twice)
    alpha_1, sigma_1 = signal_and_noise(first + span)
    return {
        "prior": 0.5 * ((alpha_1 * x).square() + sigma_1.square() - 1) - sigma_1.log(),
        # The squared error of the decoder, over its variance, has the mean 1.
        "reconstruction": _of_density(first).expand_as(x),
        "diffusion": diffusion,
    }


def _of_density(gamma: Tensor) -> Tensor:
    """-ln of the density that a field of noise ``gamma`` gives to what is under it, on average."""
    return 0.5 * (1 + math.log(2 * math.pi) + gamma)


class TargetConfig(InputConfig):
    """A field that is drawn."""

    quantum: PositiveFloat | None = None
    """Width of the steps in which the field is known: 1 for counts, the least mass for masses that are zero
    in most voxels. Fields are rounded down to it; the least noise should tell its steps apart. None where the
    field is continuous."""
    most: PositiveInt | None = None
    """Quanta that a voxel holds at most, where these are few. How often each number occurs in training is
    then built into the posterior mean: the network has to learn what a voxel's surroundings say, no more.
    The normalization is `standardize` by default, which leaves the steps alike."""

    @model_validator(mode="before")
    @classmethod
    def _few_values_need_no_logarithm(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("most") is not None:
            return {"normalization": ("standardize",), **given}
        return given

    @model_validator(mode="after")
    def _counts(self) -> "TargetConfig":
        if self.most is not None and self.quantum is None:
            raise ValueError(
                f"most is {self.most}, but of what? It counts quanta: set quantum, or leave it out"
            )
        return self


class Shares(nn.Module):
    """How often each value of a target with few of them occurs: what is known of a voxel before all else.

    Parameters
    ----------
    entry
        the target.
    """

    log: Tensor

    def __init__(self, entry: TargetConfig) -> None:
        super().__init__()
        assert entry.most is not None
        assert entry.quantum is not None
        self.quantum = entry.quantum
        self.register_buffer("log", torch.zeros(entry.most + 1))

    def fit(self, fields: Iterable[NDArray[Any]]) -> None:
        """Take them from fields of quanta; what was never seen counts as seen once."""
        counts = np.ones(len(self.log))
        for field in fields:
            n = np.minimum(np.round(field / self.quantum).astype(int), len(counts) - 1)
            counts += np.bincount(n.ravel(), minlength=len(counts))
        self.log.copy_(torch.from_numpy(np.log(counts / counts.sum())))

    def values(self, normalization: Normalization) -> Tensor:
        """The values, normalized."""
        return normalization(self.quantum * torch.arange(len(self.log), device=self.log.device))

    def forward(
        self, x: Tensor, gamma: Tensor, normalization: Normalization, chances: Tensor | None
    ) -> Tensor:
        """ln of the probability of each value, the last axis, in voxels where it would be a Gaussian about
        ``x`` had their values been standard Gaussians before all was seen.

        ``gamma`` is broadcast to ``x``. What is seen of a value y is in either case the exponential of
        (y x - alpha^2 y^2 / 2) / sigma^2, but for a factor. ``chances``, ``(b, most + 1, *mesh)``, take the
        place of how often each value occurs everywhere.
        """
        alpha, sigma = signal_and_noise(gamma)
        seen, precision = x / sigma.square(), 0.5 * (alpha / sigma).square()
        values = self.values(normalization)
        before = self.log if chances is None else chances[:, None].unbind(2)
        scores = [log + y * seen - precision * y.square() for log, y in zip(before, values, strict=True)]
        return torch.stack(scores, -1).log_softmax(-1)


class DiffusionConfig(ModelConfig):
    """Settings of a diffusion model; defaults are those of Ono et al. 2024 where they give them."""

    draws_boxes: ClassVar[bool] = True

    name: Literal["vdm"] = "vdm"
    inputs: Annotated[tuple[InputConfig, ...], Constraint(min_length=1)] = (
        InputConfig(field="matter_counts"),
    )
    """What the targets are drawn given; vector fields too."""
    targets: Annotated[tuple[TargetConfig, ...], Constraint(min_length=1)] = (
        TargetConfig(field="galaxy_counts", quantum=1.0),
    )
    """What is drawn, all of it jointly."""
    parameters: ParameterNames = ()
    """Parameters of the simulation that the targets depend on, such as Omega_m, A_SN1, redshift."""
    unknown: Annotated[float, Constraint(ge=0, lt=1)] = 0.1
    """Fraction of the training samples whose parameters are hidden, so that the model can do without."""
    spatial: Literal[2, 3] = 3
    """Dimensions that the network sees; with 2, every plane (y, x) of a box is one by itself."""
    channels: Annotated[tuple[PositiveInt, ...], Constraint(min_length=1)] = (48, 96, 192, 384, 768)
    """Of each level of the network."""
    attention: NonNegativeInt = 1
    """Cells of the coarsest level to each side that a cell attends to."""
    checkpoint_activations: bool = False
    """Compute activations again for the gradient instead of keeping them: for large crops."""
    schedule: ScheduleConfig = LinearConfig()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(entry.field for entry in (*self.inputs, *self.targets))

    @model_validator(mode="after")
    def _fields_can_be_learned(self) -> "DiffusionConfig":
        names = self.reads
        if twice := repeated(names):
            raise ValueError(f"field {twice[0]!r} is given twice; inputs and targets are different fields")
        least = self.schedule.gamma[0]
        for entry in self.targets:
            if entry.quantum is None and least > _LEAST:
                raise ValueError(
                    f"schedule.gamma starts at {least:g}, but what is drawn of {entry.field!r} keeps the "
                    f"least noise: start at {_LEAST:g} or below, or give the field a quantum"
                )
        return self

    @property
    def drawn(self) -> tuple[str, ...]:
        return tuple(entry.field for entry in self.targets)

    @property
    def counted(self) -> dict[str, int]:
        """Targets that are few whole numbers, and the largest of each."""
        return {
            entry.field: entry.most
            for entry in self.targets
            if entry.most is not None and entry.quantum == 1 and entry.components == 1
        }

    def check_parts(self, parts: Sequence[ModelConfig]) -> None:
        if not parts:
            return
        given = ", ".join(part.name for part in parts)
        if len(parts) > 1 or not isinstance(parts[0], RegressorConfig) or parts[0].likelihood is None:
            raise ValueError(
                f"{self.name} builds on one trained regressor with a likelihood, or on nothing; `models` "
                f"gives {given}"
            )
        if parts[0].target not in self.counted or self.spatial != 3:
            raise ValueError(
                f"{given} tells how many {parts[0].target} a voxel of three dimensions holds: a {self.name} "
                "on it has that among its targets, with quantum: 1 and most, and spatial: 3"
            )


_Entry = TypeVar("_Entry", bound=InputConfig)


class VariationalDiffusion(GridObjective):
    """Draws the target fields given the inputs, after training by the variational bound.

    The bound is in bits per dimension, that is per voxel and component of the targets, for the fields in
    units of their own; for fields with a ``quantum``, of the probability of the value. Training lowers it
    together with the ``surprise`` of each voxel by itself at the same noise: the posterior mean minimizes
    either, but the bound hardly asks for it where there is much noise, from which samples come.

    The network gives v = alpha e - sigma x (Salimans & Ho 2022, arXiv:2202.00512) where Ono et al. have e:
    the same mean of the posterior, x = alpha z - sigma v, and errors that are not amplified where there is
    much noise.

    It may stand on a trained `VoxelRegressor` with a likelihood, whose distribution of the counts in each
    voxel is then what is known before all else, in place of how often each number occurs. Untrained it draws
    the voxels from that independently of each other; what it learns is how they depend on each other.
    """

    Config: ClassVar[type[ModelConfig]] = DiffusionConfig
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig, parts: Sequence[Objective] = ()) -> None:
        super().__init__()
        self.config = config
        self.inputs, self.fields = tuple(entry.field for entry in config.inputs), config.reads
        self.outputs = tuple(Field(name=entry.field, components=entry.components) for entry in config.targets)
        self.simulation_parameters = config.parameters
        self.of_inputs = nn.ModuleList(Normalization(entry.normalization) for entry in config.inputs)
        self.of_targets = nn.ModuleList(Normalization(entry.normalization) for entry in config.targets)
        self.shares = nn.ModuleList(
            nn.Identity() if entry.most is None else Shares(entry) for entry in config.targets
        )
        self.schedule = config.schedule.build()
        width = 4 * config.channels[0]
        self.features = Features(config.schedule.gamma, config.parameters, width)
        n_out = sum(entry.components for entry in config.targets)
        n_in = n_out + sum(entry.components for entry in config.inputs)
        self.network = UNet(n_in, n_out, config.channels, config.spatial, width, config.attention)
        self.network.checkpoint_activations = config.checkpoint_activations
        self.alignment, self.reach = self.network.alignment, self.network.reach
        self.counts: VoxelRegressor | None = None
        self.most = 0
        if parts:
            assert isinstance(parts[0], VoxelRegressor)
            self.counts, self.most = parts[0], config.counted[parts[0].target]
            self.build_on(self.counts)

    def prepare(self, training: TrainingFields) -> None:
        for entry, normalization in _each(self.config.inputs, self.of_inputs):
            normalization.fit(partial(training, entry.field))
        for entry, normalization in _each(self.config.targets, self.of_targets):
            normalization.fit(partial(_in_steps, training, entry))
            self._require_steps_apart(entry, normalization)
        for entry, shares in zip(self.config.targets, self.shares, strict=True):
            if isinstance(shares, Shares):
                shares.fit(_in_steps(training, entry))
        if self.features.embedding is not None:
            self.features.embedding.standardize.fit(training)

    def _require_steps_apart(self, entry: TargetConfig, normalization: Normalization) -> None:
        """Refuse a schedule whose least noise hides the steps of a target: zero from the first quantum, and
        where values are few any from the next."""
        if entry.quantum is None:
            return
        n = torch.arange(entry.most or 1, device=self.network.head.weight.device)
        low, edge, high = (normalization(entry.quantum * (n + part)) for part in (0.0, 0.5, 1.0))
        apart = torch.minimum(edge - low, high - edge).min().item()
        least, needed = self.config.schedule.gamma[0], 2 * math.log(apart / _APART)
        if least > needed:
            how = ", ".join(entry.normalization)
            raise ValueError(
                f"schedule.gamma starts at {least:g}, where the noise hides which step {entry.field!r} is on "
                f"(normalization: {how}): start at {math.floor(10 * needed) / 10:g} or below"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        seeds = batch[SEED]
        terms = self._terms(batch, self._chances(batch), seeds, _evenly(seeds))
        means = {name: term.mean() for name, term in terms.items()}
        return {"loss": torch.stack(list(means.values())).sum(), **means}

    def evaluate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first = batch[self.fields[0]]
        # The same noise and times for every tile and epoch.
        seeds = torch.arange(len(first))
        sums = dict.fromkeys(TERMS, torch.zeros((), dtype=torch.float64, device=first.device))
        dimensions = 0
        chances = self._chances(batch)
        for n in range(_TIMES):
            t = (_evenly(seeds) + n) / _TIMES
            for name, term in self._terms(batch, chances, seeds + n * len(seeds), t).items():
                sums[name] = sums[name] + term.sum(dtype=torch.float64)
                dimensions = term.numel()
        means = {name: total / _TIMES for name, total in sums.items()}
        return {**means, "dimensions": torch.tensor(dimensions)}, {}

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        terms = {name: sums[name].item() / sums["dimensions"].item() for name in TERMS}
        return {"loss": sum(terms.values()), **terms}

    def crops(self, n_mesh: int, drawing: Drawing) -> int:
        return len(self._crops(n_mesh, drawing))

    def _crops(self, n_mesh: int, drawing: Drawing) -> Crops:
        return Crops(n_mesh, self.config.spatial, drawing.crop or n_mesh, drawing.overlap, self.alignment)

    def sample(
        self, batch: Batch, generator: torch.Generator, drawing: Drawing, group: ddp.Group | None = None
    ) -> dict[str, Tensor]:
        """What `draw_boxes` gives last."""
        *_, fields = self.draw_boxes(batch, generator, drawing, group)
        assert isinstance(fields, dict)
        return fields

    @torch.no_grad()
    def draw_boxes(
        self, batch: Batch, generator: torch.Generator, drawing: Drawing, group: ddp.Group | None = None
    ) -> Iterator[dict[str, Tensor] | float]:
        config = self.config
        if not batch["periodic"]:
            raise ValueError(
                f"{config.name} draws whole boxes, whose opposite faces touch; not parts of them"
            )
        # Boxes may exceed the memory of the device that the network is on.
        of_inputs, of_targets = (copy.deepcopy(part).cpu() for part in (self.of_inputs, self.of_targets))
        condition, parameters = self._condition(batch, of_inputs), self._own_parameters(batch)
        n_boxes, n_mesh, device = len(condition), condition.shape[-1], self.network.head.weight.device
        n_seen = condition.shape[1]
        shape = (n_boxes, self.network.head.out_features, *condition.shape[2:])
        noise = self._split(torch.randn(shape, generator=generator))
        condition = self._split(condition)
        if parameters is not None:
            parameters = parameters.repeat_interleave(len(noise) // n_boxes, 0)
        crops, at_once = self._crops(n_mesh, drawing), drawing.crops_at_once
        if self.counts is not None:
            condition = torch.cat([condition, self._chances_of_boxes(batch, crops, at_once, group)], 1)

        def denoise(z: Tensor, gamma: Tensor, given: Tensor, boxes: Tensor) -> Tensor:
            known = None if parameters is None else parameters[boxes].to(device)
            chances = None if self.counts is None else given[:, n_seen:]
            return self._denoise(z, gamma, given[:, :n_seen], known, crops.whole, chances=chances)

        denoiser = joint(denoise, condition, crops, at_once, device, group)
        schedule, sampler = copy.deepcopy(self.schedule).cpu(), drawing.sampler
        for step, x in enumerate(sampler.path(denoiser, schedule, noise, generator)):
            drawn = x
            if step < sampler.steps:
                yield (step + 1) / sampler.steps
        if config.spatial == 2:
            drawn = drawn.unflatten(0, (n_boxes, -1)).movedim(1, 2)
        fields = {}
        sizes = [entry.components for entry in config.targets]
        targets = _each(config.targets, of_targets)
        for (entry, normalization), part in zip(targets, drawn.split(sizes, 1), strict=True):
            field = normalization.inverse(part)
            if entry.quantum is not None:
                field = (field / entry.quantum + 0.5).floor().clamp(min=0) * entry.quantum
            fields[entry.field] = field
        yield fields

    def _terms(self, batch: Batch, chances: Tensor | None, seeds: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The bound's terms [bits] of every dimension, looked at in times ``t`` (b,), given `_chances`."""
        condition, parameters = self._condition(batch, self.of_inputs), self._own_parameters(batch)
        halo = batch["halo"]
        noise, hidden = self._draws(seeds, condition)
        x, nats = self._normalized(batch, noise)
        x, nats, noise, condition = (self._split(field, halo) for field in (x, nats, noise, condition))
        n_planes = len(x) // len(t)
        t = ((t[:, None] + torch.arange(n_planes, device=t.device) / n_planes) % 1).flatten()
        t = t.to(x.device, non_blocking=True)
        known = None
        if parameters is not None:
            parameters = parameters.repeat_interleave(n_planes, 0)
            if self.training:
                known = (hidden >= self.config.unknown).repeat_interleave(n_planes, 0)

        looks = []

        def denoiser(z: Tensor, gamma: Tensor) -> Tensor:
            look = self._look(z, gamma, condition, parameters, batch["periodic"], known)
            looks.append((look, gamma))
            return self._mean(look, gamma, chances)

        in_steps = [
            entry.quantum is not None for entry in self.config.targets for _ in range(entry.components)
        ]
        terms = bound(x, denoiser, self.schedule, t, noise, halo, in_steps)
        terms["reconstruction"] = trim(nats, halo, self.config.spatial)
        if self.training:
            terms["surprise"] = trim(self._surprise(*looks[0], x, chances), halo, self.config.spatial)
        return {name: term / math.log(2) for name, term in terms.items()}

    def _condition(self, batch: Batch, normalizations: Iterable[nn.Module]) -> Tensor:
        """Normalized inputs, ``(b, c, z, y, x)``."""
        pairs = _each(self.config.inputs, normalizations)
        return torch.cat([normalization(_field(batch, entry)) for entry, normalization in pairs], 1)

    def _normalized(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The targets, normalized, and -ln p of them in their own units given the least noisy field; both
        ``(b, c, z, y, x)``."""
        normalized, nats = [], []
        sizes = [entry.components for entry in self.config.targets]
        targets = _each(self.config.targets, self.of_targets)
        for (entry, normalization), e in zip(targets, noise.split(sizes, 1), strict=True):
            field = _field(batch, entry)
            with torch.autocast(field.device.type, enabled=False):
                decode = self._of_value if entry.quantum is None else self._of_step
                x, surprise = decode(field, entry, normalization, e)
            normalized.append(x)
            nats.append(surprise)
        return torch.cat(normalized, 1), torch.cat(nats, 1)

    def _of_value(
        self, field: Tensor, entry: TargetConfig, normalization: Normalization, e: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A field normalized, and -ln of its density."""
        with torch.enable_grad():
            field = field.detach().requires_grad_()
            x = normalization(field)
            (slope,) = torch.autograd.grad(x.sum(), field)
        return x.detach(), _of_density(self.schedule.first) - slope.log()

    def _of_step(
        self, field: Tensor, entry: TargetConfig, normalization: Normalization, e: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A field in steps normalized, and -ln of their probability: how much of the noisy field's Gaussian
        is nearer to this step than to the others."""
        assert entry.quantum is not None
        n = (field / entry.quantum).floor()
        x = normalization(n * entry.quantum)
        width = torch.exp(0.5 * self.schedule.first)  # of the noise, in units of x
        # Doubles, for in fields of many steps one is narrow. Below the first there is no other.
        low, high = (
            torch.special.ndtr((normalization(edge * entry.quantum) - x).double() / width - e)
            for edge in ((n - 0.5).clamp(min=0.5), n + 0.5)
        )
        probability = high - low * (n > 0)
        return x, -probability.clamp(min=1e-30).log().to(x.dtype)

    def _draws(self, seeds: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gaussian numbers for the targets, and a uniform one for each sample: a function of its seed alone,
        whatever batch it is in."""
        shape = (self.network.head.out_features, *like.shape[2:])
        noise, one = [], []
        for seed in seeds.tolist():
            generator = torch.Generator(like.device).manual_seed(seed)
            noise.append(torch.randn(shape, generator=generator, device=like.device))
            one.append(torch.rand((), generator=generator, device=like.device))
        return torch.stack(noise), torch.stack(one)

    def _split(self, x: Tensor, halo: int = 0) -> Tensor:
        """Fields ``(b, c, z, y, x)`` as what the network sees: in two dimensions planes ``(b z, c, y, x)``,
        those inside the halo."""
        if self.config.spatial == 3:
            return x
        return x[:, :, halo : x.shape[2] - halo].movedim(2, 1).flatten(0, 1)

    def _denoise(self, z: Tensor, gamma: Tensor, *given: Any, chances: Tensor | None = None) -> Tensor:
        """E[x | z], of what `_look` takes."""
        return self._mean(self._look(z, gamma, *given), gamma, chances)

    def _own_parameters(self, batch: Batch) -> Tensor | None:
        """The network's own of the parameters that are known."""
        parameters = batch.get(PARAMETERS)
        return None if parameters is None else parameters[:, : len(self.config.parameters)]

    def _chances(self, batch: Batch) -> Tensor | None:
        """ln of the probability of each number in each voxel, halo included, where the model stands on one
        that tells; ``(b, most + 1, z, y, x)``."""
        if self.counts is None:
            return None
        with torch.no_grad():
            return self.counts.log_chances({**batch, "halo": 0}, self.most)

    def _chances_of_boxes(
        self, batch: Batch, crops: Crops, at_once: int, group: ddp.Group | None = None
    ) -> Tensor:
        """The same of whole boxes, from their crops."""
        counts = self.counts
        assert counts is not None
        names, parameters = counts.inputs, batch.get(PARAMETERS)
        fields = [batch[name] for name in names]
        widths, device = [field.shape[1] for field in fields], self.network.head.weight.device

        def chances(z: Tensor, gamma: Tensor, given: Tensor, boxes: Tensor) -> Tensor:
            del z, gamma
            some: dict[str, Any] = {"halo": 0, "periodic": crops.whole}
            some |= zip(names, given.split(widths, 1), strict=True)
            if parameters is not None:
                some[PARAMETERS] = parameters[boxes].to(device)
            return counts.log_chances(some, self.most)

        whole = joint(chances, torch.cat(fields, 1), crops, at_once, device, group)
        nothing = fields[0].new_zeros((len(fields[0]), self.most + 1, *fields[0].shape[2:]))
        return whole(nothing, nothing.new_zeros(len(nothing)))

    def _look(
        self,
        z: Tensor,
        gamma: Tensor,
        condition: Tensor,
        parameters: Tensor | None,
        periodic: bool,
        known: Tensor | None = None,
    ) -> Tensor:
        """What all that is seen says of each voxel: E[x | z] were it a standard Gaussian before, of what
        `Features` takes."""
        with torch.autocast(z.device.type, enabled=False):  # eight bits are too few for gamma
            features = self.features(gamma, parameters, known)
        v = self.network(torch.cat([z, condition], 1), features, periodic)
        alpha, sigma = (a.view(-1, *(1,) * (z.ndim - 1)) for a in signal_and_noise(gamma))
        x: Tensor = alpha * z - sigma * v
        return x

    def _mean(self, look: Tensor, gamma: Tensor, chances: Tensor | None = None) -> Tensor:
        """E[x | z], of what `_look` gives."""
        parts = [
            part if shares is None else (shares[0].exp() * shares[1]).sum(-1)
            for part, shares in self._told(look, gamma, chances)
        ]
        return torch.cat(parts, 1)

    def _surprise(self, look: Tensor, gamma: Tensor, x: Tensor, chances: Tensor | None = None) -> Tensor:
        """-ln of the probability of each voxel's x by itself given all that is seen, but for a constant
        [nats]; of what `_look` gives."""
        parts = []
        variance = signal_and_noise(gamma)[1].square().view(-1, *(1,) * (x.ndim - 1))
        sizes = [entry.components for entry in self.config.targets]
        for y, (part, shares) in zip(x.split(sizes, 1), self._told(look, gamma, chances), strict=True):
            if shares is None:
                parts.append(0.5 * (y - part).square() / variance)
            else:
                log, values = shares
                which = (y[..., None] - values).abs().argmin(-1, keepdim=True)
                parts.append(-log.gather(-1, which)[..., 0])
        return torch.cat(parts, 1)

    def _told(
        self, look: Tensor, gamma: Tensor, chances: Tensor | None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """Of each target what `_look` gives and, where its values are few, ln of their probabilities, and
        they."""
        sizes = [entry.components for entry in self.config.targets]
        level = gamma.view(-1, *(1,) * (look.ndim - 1))
        entries, parts = self.config.targets, look.split(sizes, 1)
        for entry, part, shares, normalization in zip(
            entries, parts, self.shares, self.of_targets, strict=True
        ):
            if isinstance(shares, Shares):
                assert isinstance(normalization, Normalization)
                known = chances if self.counts is not None and entry.field == self.counts.target else None
                yield part, (shares(part, level, normalization, known), shares.values(normalization))
            else:
                yield part, None


def _each(
    entries: Sequence[_Entry], normalizations: Iterable[nn.Module]
) -> Iterator[tuple[_Entry, Normalization]]:
    for entry, normalization in zip(entries, normalizations, strict=True):
        assert isinstance(normalization, Normalization)
        yield entry, normalization


def _field(batch: Batch, entry: InputConfig) -> Tensor:
    field: Tensor = batch[entry.field]
    if field.shape[1] != entry.components:
        raise ValueError(
            f"field {entry.field!r} has {field.shape[1]} components, not the {entry.components} that the "
            "model was given"
        )
    return field


def _in_steps(training: TrainingFields, entry: TargetConfig) -> Iterator[NDArray[Any]]:
    """A target in the training simulations, rounded down to its quantum where it has one."""
    for values in training(entry.field):
        if entry.quantum is None:
            yield values
            continue
        if values.min() < 0:
            raise ValueError(
                f"field {entry.field!r} has a quantum of {entry.quantum:g}, so it counts something, but is "
                f"{values.min():g} in a voxel: leave `quantum` out"
            )
        yield np.floor(values / entry.quantum) * np.float32(entry.quantum)


def _evenly(seeds: Tensor) -> Tensor:
    """Numbers in [0, 1) as far from each other as can be for any run of successive ``seeds``: the multiples
    of the golden ratio."""
    return (((seeds % 2**31) * _GOLDEN) % 2**32).double().div(2**32).float()
