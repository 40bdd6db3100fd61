"""Bispectra of fields on a periodic mesh, by Fourier transforms of shells (Scoccimarro 2000, ApJ 544, 597;
2015, arXiv:1506.02729).

With the modes of a bin alone transformed back, D_i(x) = sum over q in bin i of delta_q exp(i q x), the sum
over all closed triangles of three bins is a sum over cells::

    B = V^2 sum_x D_1 D_2 D_3 / sum_x I_1 I_2 I_3

with I_i the same of ones. Modes are those of the cells: the window of the mass assignment is part of them.
The shot noise of counts in cells is then exactly (P_1 + P_2 + P_3) V/N - 2 (V/N)^2 with P their powers, shot
noise included.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc import mpi

Array = NDArray[np.float64]


def shells(n_mesh: int, number: int) -> Array:
    """Edges of bins of |k|, in units of k_F: half-integers, on which no mode lies, evenly spread in log.

    The last is below ``n_mesh`` / 3: no triangle of three such modes closes through an alias. On small meshes
    there are fewer than ``number`` bins.
    """
    edges: Array = np.unique(np.rint(np.geomspace(1, n_mesh // 3, number + 1))) - 0.5
    return edges


def bispectrum(mesh: Any, edges: Array) -> dict[str, Array]:
    """Bispectrum of equilateral and squeezed triangles; every rank calls it.

    Equilateral are triangles of three modes of one bin, squeezed ones of two modes of one bin and one of the
    first.

    Parameters
    ----------
    mesh
        overdensity from `galdist.statistics.spectra.field_mesh` (``assignment="none"``).
    edges
        of `shells`.

    Returns
    -------
    For each bin ``k`` (mean of its modes) [h/Mpc], ``power`` [(Mpc/h)^3] and, of both shapes, the
    ``equilateral`` and ``squeezed`` bispectrum with its ``_error`` and ``_shot_noise`` [(Mpc/h)^6]. Errors
    are those of Gaussian modes (Fry, Melott & Shandarin 1993). The squeezed one of the first bin is NaN.
    """
    comm = mpi.world()
    modes = mesh.compute(mode="complex")
    box_size, n_mesh = float(mesh.attrs["BoxSize"][0]), int(mesh.attrs["Nmesh"][0])
    volume, shot_noise = box_size**3, float(mesh.attrs["shotnoise"])
    waves = [np.asarray(k) * (box_size / (2 * np.pi)) for k in modes.x]
    radius = np.sqrt(np.rint(waves[0]) ** 2 + np.rint(waves[1]) ** 2 + np.rint(waves[2]) ** 2)
    weight = np.broadcast_to(np.where(np.rint(waves[2]) == 0, 1.0, 2.0), radius.shape)

    def real(values: Any, inside: NDArray[np.bool_]) -> Array:
        """Modes of one bin as a field."""
        shell = modes.copy()
        shell.value[...] = np.where(inside, values, 0)
        return np.asarray(shell.c2r(out=Ellipsis).value)

    def total(values: Array) -> float:
        return float(comm.allreduce(float(values.sum())))

    n_bins = edges.size - 1
    found = {name: np.full(n_bins, np.nan) for name in ("k", "power")}
    triangles = {shape: np.full(n_bins, np.nan) for shape in ("equilateral", "squeezed")}
    sums = {shape: np.full(n_bins, np.nan) for shape in triangles}
    for i in range(n_bins):
        inside = (radius > edges[i]) & (radius < edges[i + 1])
        number = total(weight[inside])
        found["k"][i] = total((weight * radius)[inside]) / number * 2 * np.pi / box_size
        found["power"][i] = volume * total((weight * np.abs(modes.value) ** 2)[inside]) / number
        ones, field = real(1.0, inside), real(modes.value, inside)
        triangles["equilateral"][i] = total(ones**3) / n_mesh**3
        sums["equilateral"][i] = total(field**3) / n_mesh**3
        if i == 0:
            long_ones, long_field = ones, field
        else:
            triangles["squeezed"][i] = total(ones**2 * long_ones) / n_mesh**3
            sums["squeezed"][i] = total(field**2 * long_field) / n_mesh**3
    power = found["power"]
    for shape, third, symmetry in (("equilateral", power, 6), ("squeezed", power[0], 2)):
        found[shape] = volume**2 * sums[shape] / triangles[shape]
        found[f"{shape}_error"] = np.sqrt(symmetry * volume * power**2 * third / triangles[shape])
        noise = shot_noise * (2 * power + third) - 2 * shot_noise**2
        found[f"{shape}_shot_noise"] = np.where(np.isfinite(found[shape]), noise, math.nan)
    return found
