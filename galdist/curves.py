"""TensorBoard on the training steps of a run, while they train and afterwards."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from galdist.status import steps_of
from hpc.strict import Problem, SettingsError

FOLDER = "tensorboard"
"""Of a training step, with its events."""


@contextlib.contextmanager
def tensorboard(out: Path, port: int | None = None) -> Iterator[str]:
    """Serve the curves of a run on this machine's loopback interface; gives the address.

    Steps that begin to train later appear by themselves. ``port`` is a free one by default.

    Raises
    ------
    hpc.strict.SettingsError
        where no step has curves yet, or the port is taken.
    """
    from tensorboard import program

    names = [step.name for step in steps_of(out)]
    if not any((out / name / FOLDER).exists() for name in names):
        raise SettingsError(str(out), [Problem((), "no step has curves yet; those that train write them")])
    # Links, because TensorBoard walks through all that is below its folder: in a run that is every chunk of
    # every store. A link to what is not there yet does no harm.
    with tempfile.TemporaryDirectory(prefix="galdist-tensorboard-") as folder:
        for name in names:
            (Path(folder) / name).symlink_to((out / name / FOLDER).absolute())
        options = {"logdir": folder, "host": "127.0.0.1", "port": port or 0, "reload_interval": 5}
        board = program.TensorBoard()
        board.configure(load_fast="false", **options)
        try:
            address = board.launch()
        except program.TensorBoardServerException as error:
            raise SettingsError("--port", [Problem((), str(error).strip())]) from None
        yield str(address)
