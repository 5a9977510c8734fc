"""The rule that makes weights and inputs, against numbers that were published with it."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tests.examples.parity import filling


def test_known_answers():
    assert filling.unit("w:selftest", 4).tolist() == [
        -0.27129366366217544,
        0.46874470713223026,
        0.3169629720701871,
        -1.2579674430581809,
    ]
    assert_array_equal(
        filling.weight("selftest.weight", (2, 2)),
        np.array(
            [
                [0.5079805850982666, -0.5221835374832153],
                [0.9862844347953796, 1.00771963596344],
            ],
            dtype=np.float32,
        ),
    )


@pytest.mark.parametrize("leaf", filling.CONSTANTS)
def test_constants_stay_as_built(leaf):
    assert filling.weight(f"any.{leaf}", (2, 2)) is None


def test_images_stay_in_range():
    image = filling.image("any", 1, 3, 64, 64)
    assert abs(image).max() == 1
    assert 0.3 < image.std() < 0.6
