"""Packages to compare with that cannot live beside galdist: each has an environment of its own.

Pylians 0.12 builds with Cython < 3 and numpy < 2 only, and smogn 0.1.2 needs numpy < 2 to run.
``python tests/benchmarks/peers.py NAME ...`` builds them (some minutes) in `FOLDER`: ``GALDIST_PEERS``, or
``galdist`` in the user's cache folder. Nothing else does: where one is missing, `Peer.run` says so.
"""

import argparse
import os
import subprocess
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
FOLDER = Path(os.environ.get("GALDIST_PEERS", _CACHE / "galdist"))

_CALL = """
import sys, numpy as np
arguments = dict(np.load(sys.argv[1]))
results = {}
exec(open(sys.argv[2]).read())
np.savez(sys.argv[3], **results)
"""


class PeerMissing(RuntimeError):
    """The environment of a package was not built."""


@dataclass(frozen=True)
class Peer:
    """A package in an environment of its own."""

    name: str
    installs: tuple[tuple[str, ...], ...]
    """What pip is given, one call after another."""
    modules: str
    """That are imported to see whether it works."""

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def _python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def _complete(self) -> Path:
        return self.folder / "complete"  # written last

    def run(self, code: str, **arguments: Any) -> dict[str, Any]:
        """Execute ``code`` there: it finds the dict ``arguments`` and fills the dict ``results``.

        Raises
        ------
        PeerMissing
            with how to build it.
        """
        if not self._complete.exists():
            raise PeerMissing(
                f"{self.name} is not in {self.folder}: build it with `python tests/benchmarks/peers.py "
                f"{self.name}`"
            )
        with tempfile.TemporaryDirectory() as folder:
            given, script, found = Path(folder, "in.npz"), Path(folder, "code.py"), Path(folder, "out.npz")
            np.savez(given, **arguments)
            script.write_text(code)
            command = [self._python, "-c", _CALL, given, script, found]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            with np.load(found) as results:
                return {key: value[()] for key, value in results.items()}

    def build(self) -> None:
        """Build the environment, unless it is complete."""
        if self._complete.exists():
            return
        venv.create(self.folder, clear=True, with_pip=True)
        for what in self.installs:
            subprocess.run([self._python, "-m", "pip", "install", *what], check=True)
        subprocess.run([self._python, "-c", f"import {self.modules}"], check=True)
        self._complete.touch()


PYLIANS = Peer(
    "pylians",
    (
        ("numpy<2", "Cython<3", "setuptools<70", "wheel", "scipy", "h5py"),
        ("--no-build-isolation", "Pylians==0.12"),
    ),
    "Pk_library, MAS_library",
)
SMOGN = Peer("smogn", (("smogn==0.1.2", "numpy<2", "pandas<2.2"),), "smogn")


def main() -> None:
    """Build the environments that are named."""
    known = {peer.name: peer for peer in (PYLIANS, SMOGN)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(known))
    for name in parser.parse_args().names:
        known[name].build()


if __name__ == "__main__":
    main()
