"""``python -m galdist``: the command line."""

from galdist.cli import main

main()
