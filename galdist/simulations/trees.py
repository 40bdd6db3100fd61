"""Merger trees of SubLink (Rodriguez-Gomez et al. 2015, MNRAS 449, 49): when a subhalo assembled its mass.

Files are ``tree*.hdf5``, as IllustrisTNG and CAMELS publish them: one row a subhalo and snapshot, depth
first, so that the main branch of a subhalo is the rows from it to its main leaf progenitor. A tree is whole
in one file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galdist.simulations.simulation import SimulationError, read_datasets

_FIELDS = ("SubhaloID", "MainLeafProgenitorID", "SnapNum", "SubfindID", "SubhaloMass")


def half_mass_redshift(
    files: Sequence[Path], subhalos: ArrayLike, snapshot: int, redshifts: ArrayLike
) -> NDArray[np.float64]:
    """Redshift at which the main progenitor of each subhalo first had half of its mass at ``snapshot``.

    Between snapshots its mass is taken to grow linearly with the scale factor. A branch that begins with more
    than half formed no later than its first snapshot, whose redshift is given.

    Parameters
    ----------
    files
        all files of the tree; see `find_trees`.
    subhalos
        (n,) rows of the group catalogue of ``snapshot``.
    snapshot
        number of that catalogue's snapshot.
    redshifts
        of the snapshots 0, 1, ...

    Returns
    -------
    array
        (n,); NaN for subhalos that are in no tree.

    Raises
    ------
    SimulationError
        for a file that cannot be read, lacks a field, or has a snapshot without redshift.
    """
    wanted = np.asarray(subhalos, np.int64)
    scale_factor = 1 / (1 + np.asarray(redshifts, np.float64))
    order = np.argsort(wanted)
    found = np.full(wanted.size, np.nan)
    for file in files:
        tree = read_datasets(file, _FIELDS)
        snap = tree["SnapNum"].astype(np.int64)
        if snap.size and not (snap.min() >= 0 and snap.max() < scale_factor.size):
            raise SimulationError(
                f"{file}: it has snapshots {snap.min()} to {snap.max()}, redshifts are given for 0 to "
                f"{scale_factor.size - 1}"
            )
        here = np.flatnonzero(snap == snapshot)
        place = np.searchsorted(wanted, tree["SubfindID"][here], sorter=order)
        place = order[np.minimum(place, wanted.size - 1)] if wanted.size else place
        hit = wanted[place] == tree["SubfindID"][here] if wanted.size else np.zeros(here.size, bool)
        for row, halo in zip(here[hit], place[hit], strict=True):
            length = int(tree["MainLeafProgenitorID"][row]) - int(tree["SubhaloID"][row]) + 1
            branch = slice(row, row + length)
            mass = tree["SubhaloMass"][branch][::-1].astype(np.float64)
            found[halo] = _half(scale_factor[snap[branch][::-1]], mass)
    return found


def _half(scale_factor: NDArray[np.float64], mass: NDArray[np.float64]) -> float:
    """Redshift of half of the last mass; times rise."""
    half = mass[-1] / 2
    first = int(np.argmax(mass >= half))
    a = scale_factor[first]
    if first > 0:
        low, high = mass[first - 1], mass[first]
        before = scale_factor[first - 1]
        a = before + (half - low) / (high - low) * (a - before)
    return float(1 / a - 1)


def find_trees(folder: Path) -> list[Path]:
    """Files of a tree in a folder, in the order of their numbers: ``tree_extended*.hdf5``, or ``tree*.hdf5``.

    Raises
    ------
    SimulationError
        where there is none, or one of a row of numbers is missing.
    """
    for stem in ("tree_extended", "tree"):
        numbered = {
            int(match[1] or 0): file
            for file in (folder.iterdir() if folder.is_dir() else ())
            if (match := re.fullmatch(rf"{stem}(?:\.(\d+))?\.hdf5", file.name))
        }
        if numbered:
            missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
            if missing:
                raise SimulationError(
                    f"{folder / f'{stem}.{missing[0]}.hdf5'}: this file of the tree is missing"
                )
            return [numbered[number] for number in sorted(numbered)]
    raise SimulationError(f"{folder}: no merger tree here: expected tree_extended.<n>.hdf5 of SubLink")
