"""Clustered particles in a periodic box, made fast: the input of benchmarks."""

import numpy as np
from scipy import fft


def clustered_particles(n: int, box_size: float, rms: float = 2.0, seed: int = 0) -> np.ndarray:
    """A lattice of n^3 particles displaced by a Zel'dovich field of P(k) ~ k^-2.

    Parameters
    ----------
    n, box_size
        particles along a side; side of the box [Mpc/h].
    rms
        of the displacement along an axis [Mpc/h].
    seed
        of the field.

    Returns
    -------
    (n^3, 3) float32
        in the order of the lattice, z slowest, as an N-body run begins.
    """
    rng = np.random.default_rng(seed)
    k = np.fft.fftfreq(n)
    kz, ky, kx = k[:, None, None], k[:, None], k[: n // 2 + 1]
    kx = np.abs(kx)
    squared = kx**2 + ky**2 + kz**2
    squared[0, 0, 0] = np.inf
    noise = fft.rfftn(rng.standard_normal((n, n, n), dtype="f4"))
    positions = np.empty((n, n, n, 3), "f4")
    centers = ((np.arange(n) + 0.5) * box_size / n).astype("f4")
    for axis, along in enumerate((kx, ky, kz)):
        shift = fft.irfftn((1j * along / squared**1.5 * noise).astype("c8"), s=(n, n, n))
        shape = [1, 1, 1]
        shape[2 - axis] = n
        positions[..., axis] = centers.reshape(shape) + shift * (rms / shift.std())
    positions %= np.float32(box_size)
    positions[positions >= np.float32(box_size)] = 0
    return positions.reshape(-1, 3)
