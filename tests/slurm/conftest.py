"""These tests talk to a real Slurm: that of ``slurm/dev``, up in the folder ``GALDIST_DEV_SLURM``.

Where none is up, the folder is left out; a file of it that is named is skipped.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

DEV = Path(__file__).parents[2] / "slurm" / "dev"
IS_UP = subprocess.run([DEV / "status"], capture_output=True).returncode == 0
MISSING = "no development Slurm is up (slurm/dev/status says so): make slurm-test"

collect_ignore_glob = [] if IS_UP else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for the whole folder: those of its tests would hide what failed."""
    if not IS_UP:
        terminalreporter.write_line(f"tests/slurm is left out: {MISSING}")


@pytest.fixture(scope="session")
def slurm() -> dict[str, str]:
    """Environment in which commands reach the development Slurm; where none is up, the tests skip."""
    if not IS_UP:
        pytest.skip(MISSING)
    up = subprocess.run([DEV / "up"], capture_output=True, text=True, check=True)  # prints where it is
    variable, _, value = shlex.split(up.stdout)[1].partition("=")
    return {**os.environ, variable: value}


@pytest.fixture(scope="module", autouse=True)
def in_this_process(slurm: dict[str, str]) -> Iterator[None]:
    """What the tests of this folder call in their own process finds that Slurm too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
        yield
