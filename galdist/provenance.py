"""What made a result: versions of the packages, commit of the source."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import galdist

PACKAGES = (
    "numpy",
    "scipy",
    "pandas",
    "numba",
    "h5py",
    "hdf5plugin",
    "zarr",
    "numcodecs",
    "xarray",
    "dask",
    "distributed",
    "mpi4py",
    "mpich",
    "torch",
    "safetensors",
    "pydantic",
    "nbodykit",
    "pmesh",
    "pfft-python",
    "classylss",
    "colossus",
    "matplotlib",
)


def versions() -> dict[str, str]:
    """Versions of galdist, Python and the packages that make the numbers."""
    found = {"galdist": galdist.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Commit of the source in use, with ``-dirty`` where it was changed; None for an installed galdist."""
    file = Path(galdist.__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
