"""Pylians, which tests and benchmarks compare with, in an environment of its own.

Pylians 0.12 builds with Cython < 3 and numpy < 2 only, so it cannot live beside galdist. ``python
tests/benchmarks/pylians.py`` builds its environment (some minutes) in `FOLDER`: ``GALDIST_PYLIANS``, or
``galdist/pylians`` in the user's cache folder. Nothing else builds it: where it is missing, `run` says so.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
FOLDER = Path(os.environ.get("GALDIST_PYLIANS", _CACHE / "galdist" / "pylians"))
PYTHON = FOLDER / "bin" / "python"
_COMPLETE = FOLDER / "complete"  # written last

_CALL = """
import sys, numpy as np
arguments = dict(np.load(sys.argv[1]))
results = {}
exec(open(sys.argv[2]).read())
np.savez(sys.argv[3], **results)
"""


class PyliansMissing(RuntimeError):
    """The environment of Pylians was not built."""


def run(code: str, **arguments: Any) -> dict[str, Any]:
    """Execute ``code`` beside Pylians: it finds the dict ``arguments`` and fills the dict ``results``.

    Raises
    ------
    PyliansMissing
        with how to build it.
    """
    if not _COMPLETE.exists():
        raise PyliansMissing(
            f"Pylians is not in {FOLDER}: build it with `python tests/benchmarks/pylians.py`"
        )
    with tempfile.TemporaryDirectory() as folder:
        given, script, found = Path(folder, "in.npz"), Path(folder, "code.py"), Path(folder, "out.npz")
        np.savez(given, **arguments)
        script.write_text(code)
        subprocess.run([PYTHON, "-c", _CALL, given, script, found], check=True, stdout=subprocess.DEVNULL)
        with np.load(found) as results:
            return {key: value[()] for key, value in results.items()}


def build() -> None:
    """Build the environment, unless it is complete."""
    if _COMPLETE.exists():
        return
    venv.create(FOLDER, clear=True, with_pip=True)
    pip: list[Any] = [PYTHON, "-m", "pip", "install"]
    subprocess.run([*pip, "numpy<2", "Cython<3", "setuptools<70", "wheel", "scipy", "h5py"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "Pylians==0.12"], check=True)
    subprocess.run([PYTHON, "-c", "import Pk_library, MAS_library"], check=True)
    _COMPLETE.touch()


if __name__ == "__main__":
    build()
    print(PYTHON, file=sys.stderr)
