"""galdist learns how galaxies populate dark matter and measures what it learned."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galdist.inference import load_model
    from galdist.run import open_run

__all__ = ["__version__", "load_model", "open_run"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # On first use, so that `import galdist` (and the command line's --help) stays instant.
    if name == "open_run":
        from galdist.run import open_run

        return open_run
    if name == "load_model":
        from galdist.inference import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
