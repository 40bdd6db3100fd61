"""The picture of a watched run: ``python tests/benchmarks/picture.py RUN docs/images/watch.svg``.

Watches a run until nobody works on it any more, and keeps the moment at which most was going on.
"""

import io
import re
import sys
import time
from collections import Counter
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from galdist.control import worker
from galdist.display import LiveDisplay
from galdist.pipeline import RunView
from galdist.status import view

FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Without the fonts that rich would have browsers fetch from the network."""


def liveliness(now: RunView) -> tuple[int, int]:
    """Kinds of states that are seen, and steps that run with a dashboard or a bar."""
    count = Counter(step.state for step in now.steps)
    return len(count), sum(step.progress is not None and bool(step.progress.links) for step in now.steps)


def draw(now: RunView, target: Path) -> None:
    """Write the SVG."""
    shown = LiveDisplay()
    shown._console = Console(width=110, file=io.StringIO(), record=True, force_terminal=True)
    shown.print(now)
    target.write_text(shown._console.export_svg(title=f"galdist watch {now.folder}", code_format=FORMAT))


def main() -> None:
    """Watch."""
    run, target = Path(sys.argv[1]), Path(sys.argv[2])
    best = (0, 0)
    while worker(run):
        now = view(run)
        if (lively := liveliness(now)) > best:
            best = lively
            draw(now, target)
            print(f"{time.strftime('%H:%M:%S')} {target}: {lively}")
        time.sleep(1)


if __name__ == "__main__":
    main()
