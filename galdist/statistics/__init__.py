"""Statistics of predictions and truths: spectra, halo occupation, metrics."""

from importlib.util import find_spec


class MissingEngine(ImportError):
    """A package that this step computes with is not installed."""


def require_nbodykit() -> None:
    """Check, without importing them, that nbodykit and pmesh are there.

    Raises
    ------
    MissingEngine
        with what to do about it.
    """
    missing = [package for package in ("nbodykit", "pmesh", "mpi4py") if find_spec(package) is None]
    if missing:
        raise MissingEngine(
            f"{' and '.join(missing)} not installed: power spectra, halo finding and simulated universes are "
            "computed with nbodykit. Run `make setup` in a checkout of galdist, which builds it into .venv "
            "(its sources do not build with pip alone); everything else works without it"
        )
