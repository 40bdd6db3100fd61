"""Power spectra, cross-correlation coefficients and transfer functions, under MPI with nbodykit.

For overdensities a (truth) and b (prediction) with Fourier modes a_k, b_k in a box of volume V, averaged
over the modes of a bin::

    P_a(k) = V <|a_k|^2>,   P_ab(k) = V <a_k b_k*>,   r(k) = P_ab / sqrt(P_a P_b),   T(k) = sqrt(P_b / P_a)

Conventions
-----------
Window. Modes are divided by the Fourier transform of the field's mass-assignment scheme, W(k) = prod_i
sinc(k_i H / 2)^p with cell side H and p = 1, 2, 3 for NGP, CIC, TSC (Jing 2005, eq. 18).

Bins. Bin n is centered on n times the fundamental mode k_F = 2 pi / L and one k_F wide. No mode lies on an
edge: |k|^2 / k_F^2 is an integer and (n + 1/2)^2 is not. The last bin ends half a k_F below the Nyquist
frequency.

Shot noise. ``power``, ``r`` and ``transfer`` are raw: shot noise is part of them. A field whose cells hold
whole numbers is a count of objects, with Poisson shot noise V/N; a mean field (expected counts,
probabilities) has none. On a mesh, aliases add to it, so that the shot noise in ``power`` is V/N times the
bin's average of C(k) / W(k)^2, with C the sum of W^2 over aliases (Jing 2005, eq. 20):
``shot_noise_power``. The ``_subtracted`` variants have it removed from auto powers; where nothing positive
is left they are NaN.

Errors. Standard deviations for Gaussian modes, from the number of modes N of the bin (k and -k both count,
half of them are independent): P sqrt(2/N) (Feldman, Kaiser & Peacock 1994) for P, (1 - r^2) / sqrt(N) for r,
T sqrt((1 - r^2) / N) for T.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field as Constraint
from pydantic import field_validator

from galdist.catalogs.catalog import CatalogStore, open_catalog
from galdist.config import StrictModel
from galdist.grids.store import Assignment, GridStore, SimulationGrids, Split, open_store, unknown_name
from galdist.statistics import require_nbodykit
from galdist.statistics.metrics import MetricRow, metric_row, over_domains, save_metrics
from galdist.statistics.response import check_parameters, responses
from hpc import durable, mpi, progress

log = logging.getLogger(__name__)

FILE = "spectra.json"
TRUTH, MATTER = "truth", "matter"

Band = tuple[Annotated[float, Constraint(ge=0)], Annotated[float, Constraint(gt=0)]]
Reader = Callable[[tuple[slice, slice, slice]], NDArray[Any]]

_POINTS_AT_ONCE = 512  # in a direct sum: bounds its memory
_ORDER: dict[Assignment, int] = {"none": 0, "ngp": 1, "cic": 2, "tsc": 3}


class SpectraConfig(StrictModel):
    """What is measured."""

    field: str = "galaxy_counts"
    """The field that predictions predict."""
    matter: str | None = "matter_counts"
    """The matter field of the grids; null leaves matter out."""
    split: Split = "test"
    """The simulations to measure."""
    band: Band = (0.3, 3.0)
    """Wavenumbers [h/Mpc] over which r and T are averaged for the table of results."""
    power_bands: Annotated[tuple[Band, ...], Constraint(min_length=1)] = ((0.3, 1.0), (1.0, 3.0))
    """Wavenumbers [h/Mpc] over which the ratio of powers is averaged."""
    response: tuple[str, ...] = ()
    """Parameters of the simulations, such as A_SN1 and sigma_8, along which the change of the number of
    galaxies and of the power in `power_bands` is measured; needs two boxes more than there are parameters."""

    @field_validator("band", "power_bands")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        for low, high in [value] if isinstance(value[0], float) else value:
            if not low < high:
                raise ValueError(
                    f"a band goes from low to high wavenumbers, not from {low:g} to {high:g} h/Mpc"
                )
        return value


@dataclass(frozen=True)
class Sample:
    """A simulation to measure: where each label's field is."""

    name: str
    domain: str
    """The step that made its grids."""
    grids: SimulationGrids
    fields: dict[str, tuple[SimulationGrids, str]]
    galaxies: dict[str, CatalogStore] = dataclasses.field(default_factory=dict)
    """Where each label's galaxies are, of those that have positions and velocities."""


def spectra(config: SpectraConfig, inputs: Mapping[str, list[Path]], out: Path) -> None:
    """Measure the spectra of truth, matter and predictions; every rank calls it.

    Where ``inputs["catalogs"]`` has the true galaxies, also the multipoles in redshift space of theirs and of
    those of predictions that have galaxies (`hod`).

    Writes ``spectra.json`` (see `load_spectra`), one nbodykit file a spectrum
    (``spectra/<simulation>/<label>.json`` and, with the truth, ``spectra/<simulation>/cross/<label>.json``;
    `nbodykit.lab.FFTPower.load` opens them), and ``metrics.json``. A simulation that was measured before an
    interruption is not measured again.

    Raises
    ------
    galdist.statistics.MissingEngine
        where nbodykit is not installed.
    ValueError
        for inputs that do not belong together, bands without modes, boxes that do not determine a response,
        or a truth without galaxies.
    """
    require_nbodykit()
    comm = mpi.world()
    samples = match(inputs, config.field, config.split, config.matter)
    for sample in samples:
        _check_bands(config, sample.name, sample.grids)
    if inputs.get("catalogs"):
        _find_galaxies(inputs, samples)
    parameters = _parameters(config, samples)
    simulations = measure_each(samples, out, lambda sample: _measure(sample, out / "spectra" / sample.name))
    if comm.rank == 0:
        result: dict[str, Any] = {"simulations": simulations}
        found = arrays(simulations)
        rows = _rows(config, found, {sample.name: sample.domain for sample in samples})
        if parameters:
            response = _response(config, parameters, list(found.values()))
            result["response"] = plain(response)
            rows += _response_rows(config, response)
        durable.write_json(out / FILE, result)
        save_metrics(out, rows)
        progress.report(len(samples), len(samples))
    comm.barrier()


def measure_each(
    samples: Sequence[Sample], out: Path, measure: Callable[[Sample], dict[str, Any]]
) -> dict[str, Any]:
    """What ``measure`` finds of each simulation, by its name, on the main rank; every rank calls it.

    Each result is kept in ``out / "parts"`` as soon as it is there, and those that are there are not measured
    again. On the other ranks the result is empty.
    """
    comm = mpi.world()
    for done, sample in enumerate(samples):
        if comm.rank == 0:
            progress.report(done, len(samples), sample.name)
        part = out / "parts" / f"{sample.name}.json"
        if not comm.bcast(part.exists()):
            result = measure(sample)
            if comm.rank == 0:
                durable.write_json(part, result)
    if comm.rank != 0:
        return {}
    return {sample.name: durable.read_json(out / "parts" / f"{sample.name}.json") for sample in samples}


def load_spectra(step: str | Path) -> dict[str, Any]:
    """The spectra of a step folder, lists as numpy arrays; needs no nbodykit.

    Returns
    -------
    ``{"simulations": {name: {...}}}`` with, for each simulation, ``box_size`` [Mpc/h], ``n_mesh``,
    ``redshift``, ``split``, ``nyquist`` [h/Mpc]; for each bin ``k`` (mean of its modes) and ``k_min``
    (lower edge) [h/Mpc] and ``modes``; ``fields``: label -> ``power`` and ``power_error`` [(Mpc/h)^3],
    ``shot_noise`` (V/N), ``shot_noise_power`` (what it adds to each bin of ``power``), ``n`` (sum of the
    field); ``cross``: label -> ``power`` with the truth, ``r``, ``r_error``, ``r_subtracted``,
    ``transfer``, ``transfer_error``, ``transfer_subtracted``. Undefined values are NaN. Where there were
    catalogs, ``multipoles``: label -> ``monopole``, ``quadrupole`` and ``shot_noise`` (`multipoles`).

    Where a `response` was asked for, ``response``: ``parameters`` and ``quantities``: ``n`` and
    ``power/k<low>-<high>`` -> what `galdist.statistics.response.responses` gives.
    """
    result: dict[str, Any] = arrays(durable.read_json(Path(step) / FILE))
    return result


def plain(value: Any) -> Any:
    """What JSON can hold: numpy's arrays and numbers as Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arrays(value: Any) -> Any:
    """The reverse of `plain`: lists of numbers as arrays, with NaN for None."""
    if isinstance(value, dict):
        return {key: arrays(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if any(isinstance(item, dict | str) for item in value):
        return [arrays(item) for item in value]
    return np.array(value, float)


def field_mesh(read: Reader, n_mesh: int, box_size: float, assignment: Assignment) -> Any:
    """The overdensity of a field on a periodic mesh, in Fourier space, window corrected; every rank calls it.

    Parameters
    ----------
    read
        gives the field in three slices, in any one order of axes; each rank asks for its own part only.
    n_mesh, box_size
        cells a side, and side [Mpc/h].
    assignment
        the scheme whose window is divided out.

    Returns
    -------
    nbodykit.source.mesh.FieldMesh, or None where the field is zero everywhere. Its ``attrs`` hold ``N``
    (the sum of the field) and ``shotnoise`` (V/N for counts, 0 for fields with fractions in them).

    Raises
    ------
    ValueError
        for values that are not finite or sum to less than zero.
    """
    from nbodykit.source.mesh.field import FieldMesh
    from pmesh.pm import ParticleMesh

    comm = mpi.world()
    pm = ParticleMesh(Nmesh=[n_mesh] * 3, BoxSize=box_size, dtype="f8", comm=comm)
    real = pm.create("real")
    if real.value.size:
        real.value[...] = read(tuple(real.slices))
    total = comm.allreduce(float(real.value.sum()))
    whole = all(comm.allgather(bool(np.all(real.value == np.rint(real.value)))))
    if not total >= 0 or math.isinf(total):
        raise ValueError(f"a density has a finite sum that is not negative; this field's is {total}")
    if total == 0:
        return None
    real.value[...] *= n_mesh**3 / total
    real.value[...] -= 1
    modes = real.r2c()
    del real
    order = _ORDER[assignment]
    if order:
        modes.apply(lambda w, v: v / _window(w, order), kind="circular", out=Ellipsis)
    mesh = FieldMesh(modes)
    mesh.attrs.update(N=total, shotnoise=box_size**3 / total if whole else 0.0)
    mesh.attrs.update(assignment=assignment, compensated=order > 0, interlaced=False)
    return mesh


def catalog_mesh(
    position: ArrayLike,
    box_size: float,
    n_mesh: int,
    weight: ArrayLike | None = None,
    interlaced: bool = True,
) -> Any:
    """The overdensity of points on a periodic mesh: TSC, window corrected; every rank calls it with its own
    points.

    Interlacing (Sefusatti et al. 2016) removes the odd aliases, so that powers are good up to the Nyquist
    frequency.

    Parameters
    ----------
    position : (n, 3) in [0, box_size) [Mpc/h]; ``n`` may differ between ranks and be 0 on some.
    weight : (n,), or None for ones.

    Returns
    -------
    nbodykit.base.catalogmesh.CatalogMesh, for `power`.

    Raises
    ------
    ValueError
        for positions outside the box, of another shape, or none on any rank.
    """
    from nbodykit.lab import ArrayCatalog

    comm = mpi.world()
    position = np.asarray(position, "f8")
    if position.ndim != 2 or position.shape[1] != 3:
        raise ValueError(f"positions have shape (n, 3), not {position.shape}")
    if not np.all((position >= 0) & (position <= box_size)):
        raise ValueError(
            f"positions lie in [0, {box_size:g}] Mpc/h; these do not (units, or a missing periodic wrap)"
        )
    if comm.allreduce(len(position)) == 0:
        raise ValueError("the catalog is empty: it has no overdensity")
    columns = {
        "Position": position,
        "Weight": np.ones(len(position)) if weight is None else np.asarray(weight, "f8"),
    }
    mesh = ArrayCatalog(columns, comm=comm, BoxSize=box_size).to_mesh(
        Nmesh=n_mesh, dtype="f8", resampler="tsc", interlaced=interlaced, compensated=True
    )
    mesh.attrs.update(assignment="tsc")
    return mesh


@dataclass(frozen=True)
class Modes:
    """Fourier modes of the overdensity of points, made once for many cross powers."""

    mesh: Any
    """All modes, for `power`: nbodykit.source.mesh.FieldMesh with ``N`` and ``shotnoise`` in ``attrs``."""
    box_size: float
    number: int
    """Points on all ranks."""
    values: NDArray[np.complex128]
    """This rank's modes in the bins."""
    bins: NDArray[np.intp]
    """The bin of each."""
    weight: NDArray[np.float64]
    """2 for those that stand for k and -k, else 1."""
    n_modes: NDArray[np.float64]
    """Of each bin, on all ranks."""

    @property
    def shot_noise(self) -> float:
        """V/N [(Mpc/h)^3]."""
        return self.box_size**3 / self.number

    def cross(self, other: "Modes") -> NDArray[np.float64]:
        """Cross power with other points on the same mesh, as `power` gives it; every rank calls it."""
        products = self.weight * (self.values * other.values.conj()).real
        total: NDArray[np.float64] = mpi.world().allreduce(
            np.bincount(self.bins, products, minlength=self.n_modes.size)
        )
        return self.box_size**3 * total / self.n_modes


def catalog_modes(position: ArrayLike, box_size: float, n_mesh: int, n_bins: int) -> Modes:
    """Modes of points of weight one, in the first ``n_bins`` bins; every rank calls it with its own points.

    Painted as `catalog_mesh` does, and with its conditions.
    """
    from nbodykit.source.mesh.field import FieldMesh

    comm = mpi.world()
    field = catalog_mesh(position, box_size, n_mesh).compute(mode="complex")
    number = comm.allreduce(len(np.asarray(position)))
    mesh = FieldMesh(field)
    mesh.attrs.update(N=number, shotnoise=box_size**3 / number)
    mesh.attrs.update(assignment="tsc", compensated=True, interlaced=True)
    waves = [np.rint(k * (box_size / (2 * np.pi))) for k in field.x]
    radius = np.sqrt(waves[0] ** 2 + waves[1] ** 2 + waves[2] ** 2)
    bins = np.floor(radius + 0.5).astype(np.intp) - 1
    inside = (bins >= 0) & (bins < n_bins)
    weight = np.broadcast_to(np.where(waves[2] == 0, 1.0, 2.0), inside.shape)[inside]
    bins = bins[inside]
    n_modes = comm.allreduce(np.bincount(bins, weight, minlength=n_bins))
    return Modes(mesh, box_size, number, field.value[inside], bins, weight, n_modes)


def power(first: Any, second: Any = None) -> Any:
    """Auto power of a mesh, or cross power of two, in the bins described above; every rank calls it.

    Returns
    -------
    nbodykit.algorithms.fftpower.FFTPower: ``.power`` has the columns ``k``, ``power`` (complex) and
    ``modes``, ``.attrs`` the shot noise V/N (0 for cross powers) and all metadata, ``.save`` writes it.
    """
    from nbodykit.algorithms.fftpower import FFTPower

    fundamental = 2 * np.pi / first.attrs["BoxSize"].max()
    result = FFTPower(
        first,
        mode="1d",
        second=second,
        dk=fundamental,
        kmin=fundamental / 2,
        kmax=(int(first.attrs["Nmesh"].min()) // 2 - 0.25) * fundamental,
    )
    for key in ("simulation", "field", "redshift", "assignment", "compensated", "interlaced"):
        if key in first.attrs:
            result.attrs[key] = first.attrs[key]
    return result


def multipoles(
    position: ArrayLike, velocity: ArrayLike, box_size: float, n_mesh: int, redshift: float, omega_m: float
) -> dict[str, NDArray[np.float64]]:
    """Monopole and quadrupole of the power of points in redshift space; every rank calls it with its own.

    Along a line of sight points are seen at ``s = x + v (1 + z) / H(z)``, in a flat universe of matter and a
    cosmological constant. Means over lines of sight along the three axes; bins are those of `power`.

    Parameters
    ----------
    position, velocity : (n, 3) in [0, box_size) [Mpc/h] and peculiar [km/s].
    omega_m
        at redshift 0.

    Returns
    -------
    ``k`` [h/Mpc], ``monopole`` and ``quadrupole`` [(Mpc/h)^3], shot noise part of the former, ``shot_noise``
    (V/N) and ``modes``.

    Raises
    ------
    ValueError
        for positions as in `catalog_mesh`, or velocities that are not theirs.
    """
    from nbodykit.algorithms.fftpower import FFTPower

    position, velocity = np.asarray(position, float), np.asarray(velocity, float)
    if velocity.shape != position.shape or not np.isfinite(velocity).all():
        raise ValueError(
            f"points of shape {position.shape} have finite velocities of that shape, not {velocity.shape}"
        )
    hubble = 100 * math.sqrt(omega_m * (1 + redshift) ** 3 + 1 - omega_m)  # [km/s h/Mpc]
    fundamental = 2 * np.pi / box_size
    poles = []
    for axis in range(3):
        seen = position.copy()
        seen[:, axis] = (seen[:, axis] + velocity[:, axis] * (1 + redshift) / hubble) % box_size
        poles.append(
            FFTPower(
                catalog_mesh(seen, box_size, n_mesh),
                mode="2d",
                poles=[0, 2],
                los=np.eye(3)[axis],
                dk=fundamental,
                kmin=fundamental / 2,
                kmax=(n_mesh // 2 - 0.25) * fundamental,
            )
        )
    return {
        "k": poles[0].poles["k"],
        "monopole": np.mean([found.poles["power_0"].real for found in poles], axis=0),
        "quadrupole": np.mean([found.poles["power_2"].real for found in poles], axis=0),
        "shot_noise": np.array(float(poles[0].attrs["shotnoise"])),
        "modes": poles[0].poles["modes"],
    }


def gaussian_variance(
    power: ArrayLike, k: ArrayLike, dk: float, number: int, box_size: float
) -> NDArray[np.float64]:
    """Variance of the power of points, shot noise removed, in bins of width ``dk`` around ``k`` [h/Mpc].

    For Gaussian modes, ``sigma^2 / P^2 = 2 / (V Vk) ((1 + n P) / (n P))^2`` with the number density n and
    ``Vk = 4 pi k^2 dk / (2 pi)^3`` (Feldman, Kaiser & Peacock 1994). Written as ``2 / (V Vk) (P + 1/n)^2`` it
    holds for powers of zero and below too.
    """
    volume = box_size**3
    modes = volume * 4 * np.pi * np.asarray(k, float) ** 2 * dk / (2 * np.pi) ** 3
    variance: NDArray[np.float64] = 2 / modes * (np.asarray(power, float) + volume / number) ** 2
    return variance


def jackknife(
    position: ArrayLike, box_size: float, n_bins: int, n_side: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Power of points and its error from the scatter between ``n_side``^3 cubes; every rank calls it.

    Modes are direct sums over the points, ``delta_k = 1/N sum exp(-i k x)``: no mesh, no window, no aliases.
    Cubes are left out one after the other. A pair of points with one in the cube that is left out counts by
    ``1 - a`` instead of nothing, ``a^2 = (n - 1) / (2 (n - 2))`` for n cubes: where cubes are independent,
    this makes the variance of pairs between cubes what it is, which the plain jackknife doubles (Mohammad &
    Percival 2022, MNRAS 514, 1289).

    Parameters
    ----------
    position : (n, 3) in [0, box_size) [Mpc/h], each rank's own; ``n`` may be 0 on some.
    n_bins
        the first so many bins of `power`.
    n_side
        cubes a side, 2 or more.

    Returns
    -------
    power without shot noise, and its standard deviation, (n_bins,) [(Mpc/h)^3].

    Raises
    ------
    ValueError
        for fewer than 2 cubes a side, or no points on any rank.
    """
    comm = mpi.world()
    position = np.asarray(position, float)
    number = comm.allreduce(len(position))
    if n_side < 2 or number == 0:
        raise ValueError(f"a jackknife needs points and 2 or more cubes a side, not {number} and {n_side}")
    wave = np.arange(-n_bins, n_bins + 1)
    half = wave[n_bins:]  # of the last axis: k and -k have conjugate modes
    radius = np.sqrt(wave[:, None, None] ** 2 + wave[:, None] ** 2 + half**2)
    bins = np.floor(radius + 0.5).astype(int)
    inside = (bins >= 1) & (bins <= n_bins)
    weight = np.broadcast_to(np.where(half > 0, 2.0, 1.0), inside.shape)[inside]
    bins = bins[inside] - 1
    modes = np.bincount(bins, weight)

    def average(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return box_size**3 * np.bincount(bins, weight * values) / modes

    cell = np.minimum((position / box_size * n_side).astype(int), n_side - 1)
    cube = np.ravel_multi_index(tuple(cell.T), (n_side,) * 3)
    n_cubes = n_side**3
    numbers = comm.allreduce(np.bincount(cube, minlength=n_cubes))
    mine: dict[int, NDArray[np.complex128]] = {}
    total = np.zeros(inside.sum(), complex)
    for index in range(n_cubes):
        summed = comm.allreduce(_direct_sum(position[cube == index] / box_size, wave, half)[inside]) / number
        corner = np.array(np.unravel_index(index, (n_side,) * 3))
        phases = [
            np.sinc(w / n_side) / n_side * np.exp(-2j * np.pi * w * (c + 0.5) / n_side)
            for w, c in zip((wave, wave, half), corner, strict=True)
        ]
        summed -= (phases[0][:, None, None] * phases[1][:, None] * phases[2])[inside]  # the mean density
        total += summed
        if index % comm.size == comm.rank:
            mine[index] = summed
    shot_noise = box_size**3 / number
    whole = average(np.abs(total) ** 2)
    factor = math.sqrt((n_cubes - 1) / (2 * (n_cubes - 2)))
    left_out = []
    for index, part in mine.items():
        within = average(np.abs(part) ** 2)
        between = 2 * average((part.conj() * (total - part)).real)
        noise = shot_noise * (1 - numbers[index] / number)
        left_out.append((whole - within - factor * between - noise) / (1 - 1 / n_cubes))
    powers = np.concatenate([np.reshape(part, (-1, n_bins)) for part in comm.allgather(left_out)])
    error = np.sqrt((n_cubes - 1) * powers.var(axis=0))
    return whole - shot_noise, error


def _direct_sum(x: NDArray[np.float64], wave: NDArray[Any], half: NDArray[Any]) -> NDArray[np.complex128]:
    """Sum of exp(-2 pi i m.x) over points ``x`` (n, 3) for all m of ``wave`` x ``wave`` x ``half``."""
    total = np.zeros((wave.size * wave.size, half.size), complex)
    for start in range(0, len(x), _POINTS_AT_ONCE):
        first, second, third = (
            np.exp(-2j * np.pi * np.outer(x[start : start + _POINTS_AT_ONCE, axis], w))
            for axis, w in enumerate((wave, wave, half))
        )
        total += (first[:, :, None] * second[:, None, :]).reshape(len(first), -1).T @ third
    return total.reshape(wave.size, wave.size, half.size)


def _window(w: list[NDArray[Any]], order: int) -> NDArray[Any]:
    """Fourier transform of the mass-assignment scheme at circular frequencies ``w`` (Jing 2005, eq. 18)."""
    first, second, third = (np.sinc(wi / (2 * np.pi)) ** order for wi in w)
    return first * second * third


def _aliased(w: list[NDArray[Any]], order: int) -> NDArray[Any]:
    """Sum of the squared window over all aliases (Jing 2005, eq. 20)."""
    sines = [np.sin(wi / 2) ** 2 for wi in w]
    if order == 2:
        sines = [1 - 2 / 3 * s for s in sines]
    elif order == 3:
        sines = [1 - s + 2 / 15 * s**2 for s in sines]
    else:  # NGP, and no scheme: every alias adds up to one
        sines = [np.ones_like(s) for s in sines]
    return sines[0] * sines[1] * sines[2]


def _aliasing(n_mesh: int, assignment: Assignment) -> NDArray[np.float64]:
    """Bin averages of C(k) / W(k)^2: what aliases and the window correction do to shot noise."""
    from nbodykit.source.mesh.field import FieldMesh
    from pmesh.pm import ParticleMesh

    pm = ParticleMesh(Nmesh=[n_mesh] * 3, BoxSize=1.0, dtype="f8", comm=mpi.world())
    modes = pm.create("complex")
    order = _ORDER[assignment]
    modes.apply(lambda w, _: np.sqrt(_aliased(w, order)) / _window(w, order), kind="circular", out=Ellipsis)
    values: NDArray[np.float64] = power(FieldMesh(modes)).power["power"].real
    return values


def match(
    inputs: Mapping[str, list[Path]], field: str, split: Split, matter: str | None = None
) -> list[Sample]:
    """Match predictions to truths, and check all that can be checked before anything is read.

    Labels are ``truth``, ``matter``, the names of the predictions' steps and ``step:field`` for further
    scalar fields of theirs.

    Raises
    ------
    ValueError
        for inputs that do not belong together.
    """
    truths: dict[str, tuple[Path, SimulationGrids]] = {}
    for step in inputs["grids"]:
        store = open_store(step / "grids.zarr")
        for name in store.names(split):
            if name in truths:
                raise ValueError(
                    f"simulation {name!r} is in {truths[name][0]} and in {step}: which is the truth?"
                )
            truths[name] = step, store[name]
    if not truths:
        raise ValueError(
            f"no simulation in the {split} split of {', '.join(map(str, inputs['grids']))}: name "
            "some under `split` of the step that made the grids"
        )
    predictions: dict[str, GridStore] = {}
    for step in inputs.get("predictions", []):
        if step.name in (TRUTH, MATTER) or step.name in predictions:
            raise ValueError(
                f"a prediction's step cannot be called {step.name!r} here: that is another field's label"
            )
        store = open_store(step / "prediction.zarr")
        if not set(store) & set(truths):
            raise ValueError(
                f"{step}/prediction.zarr predicts {', '.join(store)}, none of which is in the "
                f"{split} split of the grids ({', '.join(truths)})"
            )
        predictions[step.name] = store

    samples = []
    for name, (step, grids) in truths.items():
        fields = {TRUTH: (grids, field)}
        if matter is not None:
            fields[MATTER] = (grids, matter)
        for label, store in predictions.items():
            if name not in store:
                continue
            predicted = store[name]
            if (predicted.n_mesh, predicted.attrs.box_size) != (grids.n_mesh, grids.attrs.box_size):
                raise ValueError(
                    f"{store.path}, {name}: {predicted.n_mesh}^3 cells in {predicted.attrs.box_size} Mpc/h "
                    f"predict {grids.n_mesh}^3 cells in {grids.attrs.box_size} Mpc/h ({step}/grids.zarr)"
                )
            fields[label] = (predicted, field)
            for extra in predicted.fields:
                if extra != field and predicted.field(extra).components == 1:
                    fields[f"{label}:{extra}"] = (predicted, extra)
        for label, (where, held) in fields.items():
            if where.field(held).components != 1:
                raise ValueError(
                    f"{label} of {name}: field {held!r} is a vector; spectra are of scalar fields"
                )
        samples.append(Sample(name, step.name, grids, fields))
    return samples


def _find_galaxies(inputs: Mapping[str, list[Path]], samples: Sequence[Sample]) -> None:
    """Give every sample the true galaxies, and those that predictions have."""
    catalogs = {step: open_catalog(step / "catalog.zarr") for step in inputs["catalogs"]}
    painted = {
        step.name: open_catalog(step / "galaxies.zarr")
        for step in inputs.get("predictions", [])
        if (step / "galaxies.zarr").exists()
    }
    for sample in samples:
        attrs = sample.grids.attrs
        found = [
            store
            for store in catalogs.values()
            if sample.name in store.names() and store.attrs(sample.name).redshift == attrs.redshift
        ]
        if len(found) != 1:
            raise ValueError(
                f"{sample.name} at redshift {attrs.redshift:.3g} is in {len(found)} of the catalogs "
                f"({', '.join(map(str, catalogs))}): give one that has its galaxies"
            )
        if "Omega_m" not in attrs.cosmology:
            raise ValueError(
                f"{sample.name}: Omega_m is not known, so neither is what velocities do in redshift space: "
                "leave `catalogs` out"
            )
        sample.galaxies[TRUTH] = found[0]
        for label, store in painted.items():
            if label in sample.fields and "velocity" in store.columns(sample.name, "galaxies"):
                sample.galaxies[label] = store


def _check_bands(config: SpectraConfig, name: str, grids: SimulationGrids) -> None:
    fundamental = 2 * np.pi / grids.attrs.box_size
    centers = fundamental * np.arange(1, grids.n_mesh // 2)
    for low, high in (config.band, *config.power_bands):
        if not np.any((centers >= low) & (centers < high)):
            raise ValueError(
                f"band {low:g}-{high:g} h/Mpc has no bin of {name}: its bins lie at {centers[0]:.3g}, "
                f"{2 * centers[0]:.3g} ... {centers[-1]:.3g} h/Mpc; change `band` or `power_bands`"
            )


def _measure(sample: Sample, folder: Path) -> dict[str, Any]:
    """All spectra of one simulation, as `load_spectra` describes them but with lists."""
    grids = sample.grids
    n_mesh, box_size = grids.n_mesh, grids.attrs.box_size
    aliasing: dict[Assignment, NDArray[np.float64]] = {}
    fields: dict[str, Any] = {}
    cross: dict[str, Any] = {}
    bins: dict[str, Any] = {}
    truth = None
    for label, (where, field) in sample.fields.items():
        assignment = where.field(field).assignment
        try:
            mesh = field_mesh(partial(where.read, field), n_mesh, box_size, assignment)
        except ValueError as error:
            raise ValueError(f"{label} of {sample.name}, field {field!r}: {error}") from error
        if mesh is None:
            if label == TRUTH:
                raise ValueError(
                    f"{sample.name}: its field {field!r} is empty, so nothing can be compared with it"
                )
            log.warning("%s of %s is empty: no spectrum", label, sample.name)
            continue
        mesh.attrs.update(simulation=sample.name, field=field, redshift=grids.attrs.redshift)
        auto = power(mesh)
        _save(auto, folder / f"{label}.json")
        if assignment not in aliasing:
            aliasing[assignment] = _aliasing(n_mesh, assignment)
        shot_noise = float(auto.attrs["shotnoise"])
        fields[label] = {
            "power": auto.power["power"].real,
            "power_error": auto.power["power"].real * np.sqrt(2 / auto.power["modes"]),
            "shot_noise": shot_noise,
            "shot_noise_power": shot_noise * aliasing[assignment],
            "n": float(mesh.attrs["N"]),
        }
        if label == TRUTH:
            truth = mesh
            bins = {"k": auto.power["k"], "k_min": auto.power.edges["k"][:-1], "modes": auto.power["modes"]}
            continue
        with_truth = power(mesh, truth)
        _save(with_truth, folder / "cross" / f"{label}.json")
        cross[label] = _compare(fields[TRUTH], fields[label], with_truth.power["power"].real, bins["modes"])
    result: dict[str, Any] = {
        "box_size": box_size,
        "n_mesh": n_mesh,
        "redshift": grids.attrs.redshift,
        "split": grids.attrs.split,
        "nyquist": math.pi * n_mesh / box_size,
        **bins,
        "fields": fields,
        "cross": cross,
    }
    if sample.galaxies:
        result["multipoles"] = _multipoles(sample)
    measured: dict[str, Any] = plain(result)
    return measured


def _multipoles(sample: Sample) -> dict[str, Any]:
    """Of each label's galaxies; none of labels without galaxies."""
    comm, attrs = mpi.world(), sample.grids.attrs
    found = {}
    for label, store in sample.galaxies.items():
        table = store.table(sample.name, "galaxies", ["position", "velocity"])
        if not len(table["position"]):
            log.warning("%s of %s has no galaxies: no multipoles", label, sample.name)
            continue
        mine = slice(comm.rank, None, comm.size)
        poles = multipoles(
            table["position"][mine],
            table["velocity"][mine],
            attrs.box_size,
            sample.grids.n_mesh,
            attrs.redshift,
            attrs.cosmology["Omega_m"],
        )
        found[label] = {key: poles[key] for key in ("monopole", "quadrupole", "shot_noise")}
    return found


def _compare(
    truth: Mapping[str, Any], other: Mapping[str, Any], power: NDArray[np.float64], modes: NDArray[Any]
) -> dict[str, NDArray[np.float64]]:
    """r and T of a field with the truth, raw and with shot noise subtracted, with errors."""
    raw = truth["power"], other["power"]
    noise = truth["shot_noise_power"], other["shot_noise_power"]
    with np.errstate(invalid="ignore", divide="ignore"):
        clean = [np.where(p > s, p - s, np.nan) for p, s in zip(raw, noise, strict=True)]
        r, transfer = power / np.sqrt(raw[0] * raw[1]), np.sqrt(raw[1] / raw[0])
        unexplained = np.clip(1 - r**2, 0, None)
        return {
            "power": power,
            "r": r,
            "r_error": unexplained / np.sqrt(modes),
            "r_subtracted": power / np.sqrt(clean[0] * clean[1]),
            "transfer": transfer,
            "transfer_error": transfer * np.sqrt(unexplained / modes),
            "transfer_subtracted": np.sqrt(clean[1] / clean[0]),
        }


def _save(result: Any, path: Path) -> None:
    """`FFTPower.save`, but atomic."""
    from nbodykit.utils import JSONEncoder

    if result.comm.rank == 0:
        durable.write_text(path, json.dumps(result.__getstate__(), cls=JSONEncoder))


def _rows(
    config: SpectraConfig, simulations: Mapping[str, Any], domains: Mapping[str, str]
) -> list[MetricRow]:
    """Band averages and numbers of objects of every simulation, then their means over the split."""
    return rows_over_boxes(
        {name: _summary(config, result) for name, result in simulations.items()}, config.split, domains
    )


def rows_over_boxes(
    measured: Mapping[str, Mapping[str, tuple[float, float | None]]], split: str, domains: Mapping[str, str]
) -> list[MetricRow]:
    """Rows of every box (box -> metric -> value and error), then their means over the split, or over those of
    each step of grids (``domains``: box -> step)."""
    rows = [
        metric_row(metric, name, value, error)
        for name, values in measured.items()
        for metric, (value, error) in values.items()
    ]
    for together, names in over_domains(split, domains).items():
        for metric in dict.fromkeys(metric for name in names for metric in measured[name]):
            boxes = [measured[name][metric] for name in names if metric in measured[name]]
            mean = float(np.mean([value for value, _ in boxes]))
            if len(boxes) == 1:
                rows.append(metric_row(metric, together, mean, boxes[0][1]))
            else:  # the scatter between boxes knows more than their modes: cosmic variance, astrophysics
                scatter = float(np.std([value for value, _ in boxes], ddof=1))
                rows.append(metric_row(metric, together, mean, scatter / math.sqrt(len(boxes))))
    return rows


def _parameters(config: SpectraConfig, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Those of the response in each simulation."""
    parameters: dict[str, list[float]] = {name: [] for name in config.response}
    for sample in samples:
        attrs = sample.grids.attrs
        known = attrs.cosmology | attrs.astrophysics
        for name, values in parameters.items():
            if name not in known:
                raise ValueError(f"response: {sample.name}: {unknown_name('parameter', name, list(known))}")
            values.append(known[name])
    if parameters:
        check_parameters(parameters)
    return parameters


def _response(
    config: SpectraConfig, parameters: Mapping[str, Sequence[float]], boxes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Slopes of numbers, and of powers without shot noise, of truth, matter and what steps predict."""
    labels = [
        label
        for label in boxes[0]["fields"]
        if ":" not in label and all(label in box["fields"] for box in boxes)
    ]
    quantities = {
        "n": {label: [box["fields"][label]["n"] for box in boxes] for label in labels if label != MATTER}
    }
    for low, high in config.power_bands:
        inside = [(box["k"] >= low) & (box["k"] < high) for box in boxes]
        quantities[f"power/k{low:g}-{high:g}"] = {
            label: [
                float((field["power"] - field["shot_noise_power"])[band].mean())
                for band, field in zip(inside, (box["fields"][label] for box in boxes), strict=True)
            ]
            for label in labels
        }
    return {
        "parameters": list(parameters),
        "quantities": {name: responses(parameters, values, TRUTH) for name, values in quantities.items()},
    }


def _response_rows(config: SpectraConfig, response: Mapping[str, Any]) -> list[MetricRow]:
    kinds = {"response": ("slope", "error"), "response_difference": ("difference", "difference_error")}
    return [
        metric_row(f"{metric}/{label}/{quantity}/{parameter}", config.split, value, error)
        for quantity, labels in response["quantities"].items()
        for label, found in labels.items()
        for metric, (slope, scatter) in kinds.items()
        if slope in found
        for parameter, value, error in zip(response["parameters"], found[slope], found[scatter], strict=True)
    ]


def _summary(config: SpectraConfig, result: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The metrics of one simulation with their errors; what is undefined is left out."""
    summary: dict[str, tuple[float, float | None]] = {}

    def average(metric: str, values: NDArray[np.float64], errors: NDArray[np.float64], band: Band) -> None:
        inside = (result["k"] >= band[0]) & (result["k"] < band[1])
        mean = float(values[inside].mean())
        if math.isfinite(mean):
            error = float(np.sqrt((errors[inside] ** 2).sum()) / inside.sum())
            summary[f"{metric}/k{band[0]:g}-{band[1]:g}"] = mean, error

    for label, field in result["fields"].items():
        if label != MATTER:
            summary[f"n/{label}"] = field["n"], None
    for label, cross in result["cross"].items():
        average(f"r/{label}", cross["r"], cross["r_error"], config.band)
        if label == MATTER:
            continue
        transfer, error = cross["transfer"], cross["transfer_error"]
        average(f"transfer/{label}", transfer, error, config.band)
        for band in config.power_bands:
            average(f"power_ratio/{label}", transfer**2, 2 * transfer * error, band)
    poles = result.get("multipoles", {})
    for low, high in config.power_bands if TRUTH in poles else ():
        inside = (result["k"] >= low) & (result["k"] < high)
        means = {
            label: (
                float((p["monopole"][inside] - p["shot_noise"]).mean()),
                float(p["quadrupole"][inside].mean()),
            )
            for label, p in poles.items()
        }
        for label, (monopole, quadrupole) in means.items():
            if monopole > 0:
                summary[f"quadrupole/{label}/k{low:g}-{high:g}"] = quadrupole / monopole, None
            if label != TRUTH and means[TRUTH][0] > 0:
                summary[f"monopole_ratio/{label}/k{low:g}-{high:g}"] = monopole / means[TRUTH][0], None
    return summary
