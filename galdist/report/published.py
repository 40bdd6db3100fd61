"""Figures that papers give, beside which a run's own are shown: numbers with the names of our scores.

Labels, metrics and properties are those of `galdist.statistics.scores`; `Published.of` finds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

_MASS, _COLOR = "log_stellar_mass", "color_gi"
_BOTH = f"{_MASS}+{_COLOR}"
_POINT = ("mse", "mae", "rmse", "r2", "mad", "mape")


@dataclass(frozen=True)
class Published:
    """What was published of one data set.

    Attributes
    ----------
    citation
        where the figures are from.
    shown
        labels whose curves are drawn beside those of the best models, the first ones first.
    scores
        (label, metric, of) -> value; metrics of single values have the plain names, whatever they were of.
    tracers
        number of true galaxies of each tracer in the test split.
    remarks
        what to know of a metric before comparing.
    """

    citation: str
    shown: tuple[str, ...]
    scores: Mapping[tuple[str, str, str], float]
    tracers: tuple[int, ...] = ()
    remarks: Mapping[str, str] = field(default_factory=dict)

    def of(self, label: str, metric: str, of: str) -> float | None:
        """The published value; None where there is none."""
        return self.scores.get((label, metric, of))


def _single(label: str, mass: float, color: float) -> dict[tuple[str, str, str], float]:
    return {(label, "ks", _MASS): mass, (label, "ks", _COLOR): color}


_BALANCED = (
    "Published SQR was trained on rows balanced with SMOGN. Of ours only SQR joint SMOGN was, beside which "
    "the figures of SQR joint stand too; SQR, SQR joint and SQR joint-W were trained on the rows as they are."
)


def _pair(label: str, flat: float, mean: float | None = None) -> dict[tuple[str, str, str], float]:
    found = {(label, "ks_flat", _BOTH): flat}
    return found if mean is None else found | {(label, "ks_mean", _BOTH): mean}


def _points(label: str, of: str, *values: float | None) -> dict[tuple[str, str, str], float]:
    named = zip(_POINT, values, strict=True)
    return {(label, metric, of): value for metric, value in named if value is not None}


def _voxels(label: str, *values: float) -> dict[tuple[str, str, str], float]:
    """Accuracy, recall and precision [%] of the voxels that hold galaxies."""
    named = zip(("accuracy", "recall", "precision"), values, strict=True)
    return {(label, metric, "voxels"): value / 100 for metric, value in named}


PUBLISHED = {
    "camels": Published(
        citation="Sether & Giusarma (2024), CAMELS L25n256, after Zhang et al. (2019, arXiv:1902.05965) and "
        "Ono et al. (2024, arXiv:2403.10648)",
        shown=(),
        scores={
            **_voxels("Inception", 97.34, 95.38, 3.537),
            **_voxels("R2U-Net", 98.24, 94.16, 5.196),
            **_voxels("VDM", 99.07, 100, 83.7),
        },
        remarks={"voxels": "Those of the VDM are of maps in two dimensions, where far more cells hold some."},
    ),
    "tng300": Published(
        citation="Oyarzun & Espinoza, after Rodrigues et al. (2023, MNRAS 522, 3236) and de Santi et al. "
        "(2022, MNRAS 514, 2463)",
        shown=("SQR joint", "NN_class joint", "SQR joint-W", "SRC joint"),
        scores={
            **_single("SQR", 0.0072, 0.0094),
            **_pair("SQR", 0.0047, 0.0083),
            **_pair("SQR joint", 0.00511, 0.0095),
            **_pair("SQR joint SMOGN", 0.00511, 0.0095),
            **_pair("SQR joint-W", 0.0067, 0.0108),
            **_single("SRC", 0.044, 0.206),
            **_pair("SRC", 0.103, 0.125),
            **_pair("SRC joint", 0.097, 0.113),
            **_single("NN_class", 0.002, 0.004),
            **_pair("NN_class", 0.010),
            **_pair("NN_class joint", 0.005),
            ("SRC", "mae", _MASS): 0.120,
            **_points("SQR", _MASS, 0.0326, 0.1398, 0.1806, 0.9158, 0.1128, 1.47),
            **_points("SQR", _COLOR, 0.0610, 0.1884, 0.2470, 0.0357, 0.1489, 56.64),
            **_points("SQR joint", _BOTH, 0.0474, 0.1655, 0.2178, 0.4709, 0.1324, 27.56),
            **_points("SQR joint SMOGN", _BOTH, 0.0474, 0.1655, 0.2178, 0.4709, 0.1324, 27.56),
            **_points("SQR joint-W", _BOTH, 0.0463, 0.1640, 0.2152, 0.4851, 0.1318, 28.12),
            **_points("NN_class joint", _BOTH, 0.0539, 0.1790, 0.2323, 0.4452, 0.1442, 28.91),
            # Its columns MSE and RMSE (.3110, .5576) look like RMSE and the root of that: left out.
            **_points("SRC joint", _BOTH, None, 0.1385, None, 0.6278, 0.1129, 30.03),
        },
        tracers=(1497, 1942, 1777, 2300, 482, 11172, 6908),
        remarks={
            "ks": "The one figure given for NN_class, side by side and joint, stands under flat. "
            f"{_BALANCED}",
            "point": "Published errors of SQR and NN_class are of random draws, so that they compare with "
            "those of draws; those of SRC are of medians, which it gives for draws too. The published "
            "MSE and RMSE of SRC joint (0.3110, 0.5576) look like RMSE and the root of that, and are left "
            "out. On other galaxies of TNG300, the graph network of Wu & Jespersen (2023) has RMSE 0.129 and "
            "R² 0.951 of stellar mass, and the recurrent one of Chittenden & Tojeiro (2022) MAD 0.079 "
            f"(centrals). {_BALANCED}",
        },
    ),
}
"""By the name that a run file calls them."""
