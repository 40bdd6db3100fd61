"""Experiments that come with galdist, at small size."""

import subprocess
import sys
from pathlib import Path

import galdist
from galdist.run import Run


def cut_down(name: str, out: Path, **values: object) -> Run:
    """Run an experiment with other values; ``__`` stands for the dot of a key, ``_`` in a step for a dash."""
    command = [sys.executable, "-m", "galdist", "run", name, "--site", "debug", "--out", str(out)]
    for key, value in values.items():
        step, _, rest = key.partition("__")
        command += ["--set", f"{step.replace('_', '-')}.{rest.replace('__', '.')}={value}"]
    log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3000)
    assert log.returncode == 0, log.stdout[-3000:]
    run = galdist.open_run(out)
    assert log.stdout.rstrip().endswith("report.html") == ("report" in run.steps)
    return run
