"""Mass assignment: points onto a periodic mesh by NGP, CIC and TSC (Hockney & Eastwood 1988, section 5-3).

A cell's value is the integral of the particles' clouds over the cell, so the mesh sums to what was put in.
Sums are in float64, and the share of each particle in each cell is rounded to a multiple of 2^-30: float64
then adds shares of unit weight without any rounding (up to 2^23 particles in a cell), so that the result
does not depend on the order of the particles, to the last bit. The particles' total changes by less than
1e-8 of itself.

Particles that jump about in the box make a processor wait for memory at every one of them. They are first
put into the order of blocks of 8 x 8 rows of cells, which the caches hold (a counting sort: two passes over
the positions).
"""

from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

Scheme = Literal["ngp", "cic", "tsc"]
REACH = {"ngp": 0.5, "cic": 1.0, "tsc": 1.5}
"""Cells around a particle that it gives to, along each axis: half the width of its cloud plus half a cell."""

_ROUND = np.float64(3 << 51) * 2.0**-30  # x + _ROUND - _ROUND is x to the nearest multiple of 2^-30
_BATCH = 1 << 24  # particles sorted at a time
_BLOCK_BITS = 3
_WINDOW = 1 << 11  # particles of a sample
_IN_CACHE = 24  # blocks of rows


def assign(
    positions: NDArray[np.floating[Any]],
    box_size: float,
    n_mesh: int,
    scheme: Scheme = "cic",
    weights: NDArray[np.floating[Any]] | float | None = None,
    out: NDArray[np.float64] | None = None,
    first_plane: int = 0,
) -> NDArray[np.float64]:
    """Add particles to a mesh.

    Parameters
    ----------
    positions
        (n, 3) in the order x, y, z, in [0, box_size].
    box_size
        side of the periodic box, in the units of the positions.
    n_mesh
        cells along each side; cell i holds [i, i + 1) box_size / n_mesh.
    scheme
        ``ngp`` (one cell), ``cic`` (2^3 cells) or ``tsc`` (3^3 cells).
    weights
        what each particle carries (a mass, a component of momentum), or all of them; numbers by default.
    out
        (nz, n_mesh, n_mesh) float64, index order (z, y, x): added to in place; a new mesh by default.
    first_plane
        z index of the first plane of ``out``, which may be a slab of the box: what falls outside it is left
        out.

    Returns
    -------
    array (nz, n_mesh, n_mesh) of float64
        ``out``.

    Raises
    ------
    ValueError
        for arrays of another shape or type, and positions outside the box.
    """
    if scheme not in _KERNELS:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(_KERNELS)}")
    if positions.ndim != 2 or positions.shape[1] != 3 or positions.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"positions: (n, 3) of float32 or float64 expected, got {positions.shape} of {positions.dtype}"
        )
    if out is None:
        out = np.zeros((n_mesh, n_mesh, n_mesh))
    if (
        out.ndim != 3
        or out.shape[1:] != (n_mesh, n_mesh)
        or out.dtype != np.float64
        or not out.flags.c_contiguous
    ):
        raise ValueError(
            f"out: contiguous float64 (nz, {n_mesh}, {n_mesh}) expected, got {out.shape} of {out.dtype}"
        )
    shares = None if weights is None else np.atleast_1d(np.asarray(weights, np.float64))
    if shares is not None and shares.shape not in ((1,), (len(positions),)):
        raise ValueError(f"weights: 1 or {len(positions)} (as particles) expected, got {shares.shape}")
    if n_mesh < 3:
        raise ValueError(f"n_mesh: at least 3 cells expected, got {n_mesh}")
    positions = np.ascontiguousarray(positions)
    for start in range(0, len(positions), _BATCH):
        batch = positions[start : start + _BATCH]
        share = shares if shares is None or len(shares) == 1 else shares[start : start + _BATCH]
        if _jump_about(batch, box_size, n_mesh):
            batch, share = _in_blocks(batch, share, box_size, n_mesh)
        n_outside = _KERNELS[scheme](
            out.reshape(-1), batch, share, n_mesh / box_size, n_mesh, first_plane, len(out)
        )
        if n_outside:
            raise ValueError(f"positions: {n_outside} particles are outside the box [0, {box_size:g}]")
    return out


def _jump_about(positions: NDArray[Any], box_size: float, n_mesh: int) -> bool:
    """Whether particles that follow one another lie in more blocks of rows than caches hold; on a sample."""
    if len(positions) < _WINDOW << 4:
        return False  # sorting would not pay
    scale = n_mesh / (box_size * (1 << _BLOCK_BITS))
    n_blocks = []
    for start in np.linspace(0, len(positions) - _WINDOW, 5).astype(np.int64):
        with np.errstate(invalid="ignore"):  # the kernels count what is not a number
            block = (positions[start : start + _WINDOW, 1:] * scale).astype(np.int64)
        n_blocks.append(len(np.unique(block[:, 1] * n_mesh + block[:, 0])))
    return bool(np.median(n_blocks) > _IN_CACHE)


def _in_blocks(
    positions: NDArray[Any], weights: NDArray[np.float64] | None, box_size: float, n_mesh: int
) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """Particles in the order of blocks of rows, and within a block in the order given."""
    keys = np.empty(len(positions), np.int32)
    ordered = np.empty_like(positions)
    n_blocks = (n_mesh >> _BLOCK_BITS) + 1
    if weights is None or len(weights) == 1:
        _sort(positions, None, n_mesh / box_size, n_blocks, keys, ordered, None)
        return ordered, weights
    ordered_weights = np.empty_like(weights)
    _sort(positions, weights, n_mesh / box_size, n_blocks, keys, ordered, ordered_weights)
    return ordered, ordered_weights


def _compiled(function: Any) -> Any:
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@_compiled
def _sort(positions, weights, scale, n_blocks, keys, ordered, ordered_weights):  # type: ignore[no-untyped-def]
    ends = np.zeros(n_blocks * n_blocks + 1, np.int64)
    last = n_blocks - 1
    for i in range(positions.shape[0]):
        # What is outside the box goes to the edge; the kernels count it.
        z = min(max(int(positions[i, 2] * scale) >> _BLOCK_BITS, 0), last)
        y = min(max(int(positions[i, 1] * scale) >> _BLOCK_BITS, 0), last)
        keys[i] = z * n_blocks + y
        ends[keys[i] + 1] += 1
    for k in range(n_blocks * n_blocks):
        ends[k + 1] += ends[k]
    for i in range(positions.shape[0]):
        j = ends[keys[i]]
        ends[keys[i]] = j + 1
        ordered[j, 0] = positions[i, 0]
        ordered[j, 1] = positions[i, 1]
        ordered[j, 2] = positions[i, 2]
        if weights is not None:
            ordered_weights[j] = weights[i]


# The kernels are the inner loop of the program. Meshes are flat with unsigned indices, for the compiler then
# has no negative indices to think of, and coordinates are shifted to be positive, for truncation is cheaper
# than floor.


@_compiled
def _ngp(mesh, positions, weights, scale, n, first, n_planes):  # type: ignore[no-untyped-def]
    n_outside = 0
    step = 0 if weights is None or weights.shape[0] == 1 else 1
    for i in range(positions.shape[0]):
        x, y, z = positions[i, 0] * scale, positions[i, 1] * scale, positions[i, 2] * scale
        if not (0 <= x <= n and 0 <= y <= n and 0 <= z <= n):
            n_outside += 1
            continue
        ix, iy, iz = int(x) % n, int(y) % n, int(z) % n
        plane = iz - first if iz >= first else iz - first + n
        if plane < n_planes:
            cell = np.uintp((plane * n + iy) * n + ix)
            mesh[cell] += 1.0 if weights is None else weights[i * step]
    return n_outside


@_compiled
def _cic(mesh, positions, weights, scale, n, first, n_planes):  # type: ignore[no-untyped-def]
    n_outside = 0
    step = 0 if weights is None or weights.shape[0] == 1 else 1
    for i in range(positions.shape[0]):
        # The particle is between the centers of cells k - 1 and k, at d from the first.
        x, y, z = positions[i, 0] * scale + 0.5, positions[i, 1] * scale + 0.5, positions[i, 2] * scale + 0.5
        if not (0.5 <= x <= n + 0.5 and 0.5 <= y <= n + 0.5 and 0.5 <= z <= n + 0.5):
            n_outside += 1
            continue
        kx, ky, kz = int(x), int(y), int(z)
        dx, dy, dz = x - kx, y - ky, z - kz
        x0, x1 = (kx - 1 if kx > 0 else n - 1), (kx if kx < n else 0)
        y0, y1 = (ky - 1 if ky > 0 else n - 1), (ky if ky < n else 0)
        weight = 1.0 if weights is None else weights[i * step]
        for half in range(2):
            iz = kz - 1 + half
            if iz < 0:
                iz += n
            elif iz >= n:
                iz -= n
            plane = iz - first if iz >= first else iz - first + n
            if plane < n_planes:
                wz = dz if half else 1.0 - dz
                w0, w1 = wz * (1.0 - dy), wz * dy
                row0, row1 = (plane * n + y0) * n, (plane * n + y1) * n
                mesh[np.uintp(row0 + x0)] += ((w0 * (1.0 - dx) + _ROUND) - _ROUND) * weight
                mesh[np.uintp(row0 + x1)] += ((w0 * dx + _ROUND) - _ROUND) * weight
                mesh[np.uintp(row1 + x0)] += ((w1 * (1.0 - dx) + _ROUND) - _ROUND) * weight
                mesh[np.uintp(row1 + x1)] += ((w1 * dx + _ROUND) - _ROUND) * weight
    return n_outside


@_compiled
def _tsc(mesh, positions, weights, scale, n, first, n_planes):  # type: ignore[no-untyped-def]
    n_outside = 0
    step = 0 if weights is None or weights.shape[0] == 1 else 1
    for i in range(positions.shape[0]):
        x, y, z = positions[i, 0] * scale, positions[i, 1] * scale, positions[i, 2] * scale
        if not (0 <= x <= n and 0 <= y <= n and 0 <= z <= n):
            n_outside += 1
            continue
        kx, ky, kz = int(x), int(y), int(z)  # the cell that holds it, and d from that cell's center
        dx, dy, dz = x - kx - 0.5, y - ky - 0.5, z - kz - 0.5
        wx0, wx1, wx2 = 0.5 * (0.5 - dx) ** 2, 0.75 - dx * dx, 0.5 * (0.5 + dx) ** 2
        x0, x1, x2 = (kx + n - 1) % n, kx % n, (kx + 1) % n
        weight = 1.0 if weights is None else weights[i * step]
        for jz in range(-1, 2):
            iz = (kz + jz + n) % n
            plane = iz - first if iz >= first else iz - first + n
            if plane >= n_planes:
                continue
            wz = 0.75 - dz * dz if jz == 0 else 0.5 * (0.5 + jz * dz) ** 2
            for jy in range(-1, 2):
                wzy = wz * (0.75 - dy * dy if jy == 0 else 0.5 * (0.5 + jy * dy) ** 2)
                row = (plane * n + (ky + jy + n) % n) * n
                mesh[np.uintp(row + x0)] += ((wzy * wx0 + _ROUND) - _ROUND) * weight
                mesh[np.uintp(row + x1)] += ((wzy * wx1 + _ROUND) - _ROUND) * weight
                mesh[np.uintp(row + x2)] += ((wzy * wx2 + _ROUND) - _ROUND) * weight
    return n_outside


_KERNELS: dict[str, Any] = {"ngp": _ngp, "cic": _cic, "tsc": _tsc}
