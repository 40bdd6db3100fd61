"""Which snapshot of CAMELS and IllustrisTNG is of which time.

CAMELS: scale factors of the 91 snapshots as its documentation has them (``times_extended.txt`` and the table
"Redshifts" of https://camels.readthedocs.io). IllustrisTNG: the 20 full snapshots (Nelson et al. 2019,
arXiv:1812.05609). Simulations write the time step next to such a time: theirs differ from these in the third
digit.
"""

from typing import Literal

Layout = Literal["camels", "tng"]
ALIKE = 0.003
"""Scale factors that differ by less are one snapshot's."""

_CAMELS = (
    *(0.062542, 0.069744, 0.077040, 0.081935, 0.087141, 0.093560, 0.099977, 0.105326, 0.110961, 0.116345),
    *(0.121414, 0.126704, 0.132224, 0.137332, 0.142638, 0.148149, 0.153872, 0.160576, 0.166780, 0.172404),
    *(0.178218, 0.183358, 0.188646, 0.194086, 0.199683, 0.205441, 0.211366, 0.216433, 0.222674, 0.229096),
    *(0.235703, 0.242500, 0.249493, 0.256688, 0.262842, 0.269143, 0.275596, 0.282203, 0.288969, 0.295896),
    *(0.302990, 0.310254, 0.317693, 0.325309, 0.333108, 0.341094, 0.349272, 0.357645, 0.366220, 0.375000),
    *(0.383990, 0.393196, 0.402623, 0.412275, 0.422159, 0.434333, 0.442644, 0.455409, 0.466327, 0.477507),
    *(0.488955, 0.500677, 0.512681, 0.524972, 0.537558, 0.550446, 0.563642, 0.577155, 0.590992, 0.605161),
    *(0.619669, 0.634525, 0.649738, 0.665315, 0.681266, 0.697598, 0.714323, 0.731448, 0.748985, 0.770584),
    *(0.789058, 0.807975, 0.827346, 0.847181, 0.867492, 0.888289, 0.909586, 0.931392, 0.953722, 0.976587),
    1.0,
)
# Simulations of 34 snapshots: what the snapshots 000, 001, ... are in a row of 91.
_OF_34 = (14, 18, 24, 28, 32, *range(34, 91, 2))
_TNG = {
    **{2: 12.0, 3: 11.0, 4: 10.0, 6: 9.0, 8: 8.0, 11: 7.0, 13: 6.0, 17: 5.0, 21: 4.0, 25: 3.0, 33: 2.0},
    **{40: 1.5, 50: 1.0, 59: 0.7, 67: 0.5, 72: 0.4, 78: 0.3, 84: 0.2, 91: 0.1, 99: 0.0},
}
_TIMES = {"camels": dict(enumerate(_CAMELS)), "tng": {n: 1 / (1 + z) for n, z in _TNG.items()}}


def snapshot_at(layout: Layout, redshift: float) -> tuple[int, float]:
    """Number and scale factor of the snapshot at ``redshift``, of the 91 of CAMELS or the full ones of TNG.

    Raises
    ------
    ValueError
        where there is none; the message has the nearest redshifts.
    """
    a = 1 / (1 + redshift)
    near = sorted(_TIMES[layout].items(), key=lambda item: abs(item[1] - a))
    if abs(near[0][1] - a) > ALIKE:
        nearest = " and ".join(f"{1 / time - 1:.2f} ({number:03d})" for number, time in near[:2])
        raise ValueError(f"no snapshot of {layout} is at redshift {redshift:g}; the nearest are at {nearest}")
    return near[0]


def possible_numbers(layout: Layout, redshift: float) -> tuple[int, ...]:
    """Numbers that the snapshot at ``redshift`` may have: in CAMELS also that among 34 snapshots.

    Raises
    ------
    ValueError
        as `snapshot_at`.
    """
    number, _ = snapshot_at(layout, redshift)
    old = (_OF_34.index(number),) if layout == "camels" and number in _OF_34 else ()
    return (number, *old)
