"""The sbatch launchers: what can be said of them without Slurm."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from galdist.stages import STAGES

FOLDER = Path(__file__).parents[1] / "slurm"
LAUNCHERS = {path.stem: path for path in sorted(FOLDER.glob("*.sbatch"))}
CHAIN = FOLDER / "chain.sh"


def stages(launcher: str) -> list[str]:
    return re.findall(r"--stage (\S+)", LAUNCHERS[launcher].read_text().splitlines()[-1])


def test_every_stage_is_in_one_launcher() -> None:
    """A stage that is new must get its place; `run` has them all."""
    assert stages("run") == []
    assert Counter(stage for name in LAUNCHERS for stage in stages(name)) == Counter(list(STAGES))


def test_the_chain_has_every_launcher() -> None:
    """In an order in which no stage waits for one of a launcher after its own."""
    order = re.findall(r"for launcher in (.*);", CHAIN.read_text())[0].split()
    assert sorted(["run", *order]) == sorted(LAUNCHERS)
    assert [stage for name in order for stage in stages(name)] == list(STAGES)


def test_launchers_differ_in_little() -> None:
    """What is said in all of them is the same in all of them."""

    def common(text: str) -> list[str]:
        own = r"^#(?!SBATCH --(signal|requeue|open-mode|output))|^exec "
        return [line for line in text.splitlines() if not re.match(own, line)]

    first, *others = (common(path.read_text()) for path in LAUNCHERS.values())
    assert len(first) > 10
    assert all(other == first for other in others)


def test_a_signal_before_galdist_listens(tmp_path: Path) -> None:
    """Slurm may tell a job that its time is nearly over as soon as it has begun."""
    galdist = tmp_path / "bin" / "galdist"
    galdist.parent.mkdir()
    galdist.write_text("#!/bin/sh\nkill -USR1 $$\nkill -USR2 $$\necho alive")
    galdist.chmod(0o755)
    for path in LAUNCHERS.values():
        environment = os.environ | {"GALDIST_VENV": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
        done = subprocess.run(["bash", path, "FILE"], env=environment, capture_output=True, text=True)
        assert done.stdout == "alive\n", path


@pytest.mark.parametrize("path", [*LAUNCHERS.values(), CHAIN], ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    checker = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if checker:
        subprocess.run([checker, path], check=True)
    assert os.access(path, os.X_OK) == (path == CHAIN)
