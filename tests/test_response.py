"""Slopes along parameters: against power laws, another library, and the scatter of many realizations."""

import numpy as np
import pytest
from scipy import stats

from galdist.statistics.response import check_parameters, responses, slopes

RNG = np.random.default_rng(5)
BOXES = {"A_SN1": np.exp(RNG.uniform(-1.4, 1.4, 30)), "sigma_8": RNG.uniform(0.6, 1, 30)}


def power_law(feedback: float, amplitude: float) -> np.ndarray:
    return 300 * BOXES["A_SN1"] ** feedback * BOXES["sigma_8"] ** amplitude


def test_exponents_of_power_laws_are_found() -> None:
    values = {"truth": power_law(-0.4, 1.5), "model": power_law(-0.1, 1.5), "empty": np.zeros(30)}
    found = responses(BOXES, values, "truth")
    assert set(found) == {"truth", "model"}
    np.testing.assert_allclose(found["truth"]["slope"], [-0.4, 1.5])
    np.testing.assert_allclose(found["model"]["slope"], [-0.1, 1.5])
    np.testing.assert_allclose(found["model"]["difference"], [0.3, 0], atol=1e-12)
    for each in found.values():
        np.testing.assert_allclose(each["error"], 0, atol=1e-12)
    assert "difference" not in found["truth"]


def test_along_one_parameter_it_is_linear_regression() -> None:
    x, y = RNG.normal(size=(2, 12))
    slope, error = slopes(x[:, None], y)
    expected = stats.linregress(x, y)
    assert (slope[0], error[0]) == (pytest.approx(expected.slope), pytest.approx(expected.stderr))


def test_errors_are_the_scatter_of_slopes() -> None:
    x = RNG.normal(size=(15, 3))
    found = [slopes(x, x @ [1, 0, -2] + RNG.normal(0, 0.5, 15)) for _ in range(3000)]
    slope, error = (np.array(part) for part in zip(*found, strict=True))
    np.testing.assert_allclose(slope.mean(axis=0), [1, 0, -2], atol=0.02)
    np.testing.assert_allclose(np.sqrt(np.mean(error**2, axis=0)), slope.std(axis=0), rtol=0.06)


def test_scatter_that_truth_and_model_share_is_no_error_of_their_difference() -> None:
    scatter = np.exp(RNG.normal(0, 0.3, 30))
    own = np.exp(RNG.normal(0, 0.003, 30))
    values = {"truth": power_law(-0.4, 1.5) * scatter, "model": power_law(-0.1, 1.5) * scatter * own}
    found = responses(BOXES, values, "truth")["model"]
    assert np.all(found["difference_error"] < 0.03 * found["error"])
    assert np.all(np.abs(found["difference"] - [0.3, 0]) < 5 * found["difference_error"])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"a": [1, 2, 3], "b": [3, 1, 2]}, "3 boxes do not determine the slopes of 2"),
        ({"a": [1, 2, 3, 4], "b": [2, 4, 6, 8]}, "varies independently"),
        ({"a": [1, 1, 1, 1]}, "varies independently"),
        ({"a": [0, 1, 2, 3]}, "a is 0 in a box"),
    ],
)
def test_boxes_that_say_nothing_are_refused(parameters: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parameters(parameters)
