"""Simulations on disk: readers, and the maker of universes in the same files.

``READERS`` maps a file layout to ``module:function``; each function gives a list of
`galdist.simulations.simulation.Simulation`. A new layout is one module and one line here.
"""

READERS: dict[str, str] = {
    "camels": "galdist.simulations.camels:open_simulations",
    "tng": "galdist.simulations.tng:open_simulations",
}
