"""Samplers: from noise to a field, with nothing but a denoiser and a noise schedule.

A denoiser gives the posterior mean E[x | z] of a noisy field z = alpha x + sigma e (`galdist.models.noise`).
Whatever has that interface can be sampled: a network, a formula, or a network on overlapping crops of a
larger box (`joint`).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from galdist.config import StrictModel
from galdist.models.noise import signal_and_noise
from hpc import ddp

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(z, gamma) -> E[x | z]``: fields ``(b, c, *mesh)`` whose noise is gamma ``(b,)``."""

CropDenoiser = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(z, gamma, condition, boxes) -> E[x | z]``: a `Denoiser` of crops ``(n, c, *crop)`` that also sees the
crops of a condition, and of which box each is, ``(n,)``."""


class Sampler(StrictModel):
    """A way from noise to data, in steps of equal time.

    ``ancestral`` draws from the reverse process (Ho et al. 2020, arXiv:2006.11239; Kingma et al. 2021,
    arXiv:2107.00630, eq. 33). The two others follow the probability flow, which draws nothing after the first
    noise: ``ddim`` to first order (Song et al. 2021, arXiv:2010.02502), ``dpm-solver++`` to second, from the
    step before (2M of Lu et al. 2022, arXiv:2211.01095).
    """

    kind: Literal["ancestral", "ddim", "dpm-solver++"] = "dpm-solver++"
    steps: PositiveInt = 50
    """Evaluations of the denoiser."""

    def draw(
        self,
        denoiser: Denoiser,
        schedule: Callable[[Tensor], Tensor],
        noise: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """A sample of each of the fields.

        Parameters
        ----------
        denoiser
            posterior mean of what is drawn.
        schedule
            gamma(t) of times in [0, 1].
        noise
            ``(b, c, *mesh)``, standard Gaussian: what the sample is made from.
        generator
            of the noise that ``ancestral`` adds, on the device of ``noise``.

        Returns
        -------
        Tensor ``(b, c, *mesh)``: the last noisy field over its alpha, that is the data and the noise that is
        left where the schedule ends.
        """
        for x in self.path(denoiser, schedule, noise, generator):
            drawn = x
        return drawn

    def path(
        self,
        denoiser: Denoiser,
        schedule: Callable[[Tensor], Tensor],
        noise: Tensor,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """The posterior mean at each step, and last what `draw` gives."""
        levels = schedule(torch.linspace(1, 0, self.steps + 1, device=noise.device)).double()
        z, before = noise, None
        for n, (gamma, target) in enumerate(itertools.pairwise(levels)):
            x = denoiser(z, gamma.to(z.dtype).expand(len(z)))
            yield x
            ahead = x
            if self.kind == "dpm-solver++" and before is not None:
                # The mean half way to the target, by a line through the last two.
                ahead = torch.lerp(before, x, 1 + 0.5 * float((target - gamma) / (gamma - levels[n - 1])))
            before = x
            (alpha, sigma), (alpha_next, sigma_next) = signal_and_noise(gamma), signal_and_noise(target)
            # Of the noise ahead, what is drawn anew; the rest is in the noise that is there.
            fresh = -torch.expm1(target - gamma) if self.kind == "ancestral" else torch.zeros_like(gamma)
            kept = sigma_next * (1 - fresh).sqrt() / sigma
            z = (kept * z).add_(ahead, alpha=float(alpha_next - kept * alpha))  # boxes may be large
            if self.kind == "ancestral":
                new = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
                z.add_(new, alpha=float(sigma_next * fresh.sqrt()))
        yield z / signal_and_noise(levels[-1])[0]


class Drawing(StrictModel):
    """How boxes are drawn jointly: settings that a trained model leaves open."""

    sampler: Sampler = Sampler()
    crop: PositiveInt | None = None
    """Side of the crops in which a larger box is drawn [cells], as a rule that of training; by default a box
    is one."""
    overlap: NonNegativeInt = 0
    """Cells that neighboring crops share."""
    crops_at_once: PositiveInt = 4
    """Crops that go through the network together."""

    @model_validator(mode="after")
    def _crops_share_less_than_all(self) -> "Drawing":
        if self.crop is None and self.overlap:
            raise ValueError(
                f"overlap is {self.overlap}, but of what? It is of crops: set crop, or leave it out"
            )
        if self.crop is not None and self.crop <= self.overlap:
            raise ValueError(
                f"crops of {self.crop} cells cannot share {self.overlap}: raise crop or lower overlap"
            )
        return self


class Crops:
    """A periodic mesh covered by overlapping crops, with weights that add to one in every cell.

    Parameters
    ----------
    n_mesh, spatial
        cells of a side of the mesh, and its dimensions.
    crop
        side of the crops. Where the mesh is no larger, the mesh itself is the only crop.
    overlap
        cells that neighbors share at least. Across its middle half the weight goes smoothly from one to the
        other; the quarter of it next to a face, where a crop lacks its surroundings, has no weight.
    alignment
        origins are multiples of it.

    Raises
    ------
    ValueError
        where the crops do not cover the mesh so.
    """

    def __init__(self, n_mesh: int, spatial: int, crop: int, overlap: int, alignment: int) -> None:
        self.whole = n_mesh <= crop
        """Whether a crop is the whole mesh."""
        if self.whole:
            axis = [(torch.arange(n_mesh), torch.ones(n_mesh))]
        else:
            for what, cells in (("crop", crop), ("n_mesh", n_mesh)):
                if cells % alignment:
                    raise ValueError(
                        f"{what} is {cells}: this network halves its mesh, so it must be a multiple of "
                        f"{alignment}"
                    )
            if crop - overlap < alignment:
                raise ValueError(
                    f"crops of {crop} cells that share {overlap} leave less than the {alignment} cells that "
                    "their origins must differ by: raise crop or lower overlap"
                )
            axis = _cover(n_mesh, crop, overlap, alignment)
        self._crops = list(itertools.product(axis, repeat=spatial))

    def __len__(self) -> int:
        return len(self._crops)

    def index(self, crop: int) -> tuple[slice | Tensor, ...]:
        """Where the cells of a crop lie in a field ``(c, *mesh)``."""
        return (slice(None), *torch.meshgrid(*(cells for cells, _ in self._crops[crop]), indexing="ij"))

    def weight(self, crop: int) -> Tensor:
        """Share of a crop in each of its cells."""
        weights = torch.meshgrid(*(weight for _, weight in self._crops[crop]), indexing="ij")
        return torch.stack(weights).prod(0)


def _cover(n_mesh: int, crop: int, overlap: int, alignment: int) -> list[tuple[Tensor, Tensor]]:
    """Cells and weights of the crops along one axis."""
    blocks = n_mesh // alignment
    number = math.ceil(blocks / ((crop - overlap) // alignment))
    inside = torch.arange(crop)
    from_face = torch.minimum(inside, crop - 1 - inside) + 0.5
    ramp = ((from_face - overlap / 4) / max(overlap / 2, 1)).clamp(0, 1)
    window = torch.sin(0.5 * math.pi * ramp).square()
    axis = [(j * blocks // number * alignment + inside) % n_mesh for j in range(number)]
    total = torch.zeros(n_mesh)
    for cells in axis:
        total[cells] += window
    return [(cells, window / total[cells]) for cells in axis]


def joint(
    denoise: CropDenoiser,
    condition: Tensor,
    crops: Crops,
    batch_size: int,
    device: torch.device,
    group: ddp.Group | None = None,
) -> Denoiser:
    """A denoiser of whole periodic boxes: the posterior means of their crops, blended.

    Steps follow one another, crops do not: they go through ``denoise`` ``batch_size`` at a time, and are
    shared over the ranks of ``group``, each of which holds the boxes and their ``condition``
    ``(b, c, *mesh)``. Boxes stay where they are; crops go to ``device``.
    """

    def cut(boxes: Tensor, some: list[tuple[int, int]]) -> Tensor:
        return torch.stack([boxes[box][crops.index(crop)] for box, crop in some]).to(device)

    def denoiser(z: Tensor, gamma: Tensor) -> Tensor:
        pairs = list(itertools.product(range(len(z)), range(len(crops))))
        if group is not None:
            pairs = pairs[group.rank :: group.world_size]
        mean = torch.zeros_like(z)
        for start in range(0, len(pairs), batch_size):
            some = pairs[start : start + batch_size]
            boxes = torch.tensor([box for box, _ in some])
            means = denoise(cut(z, some), gamma[boxes].to(device), cut(condition, some), boxes)
            for (box, crop), x in zip(some, means.to(z.device), strict=True):
                mean[box][crops.index(crop)] += crops.weight(crop) * x
        if group is not None:
            mean = group.sum({"mean": mean})["mean"]
        return mean

    return denoiser
