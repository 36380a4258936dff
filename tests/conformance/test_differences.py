"""Cases in which eventtrain is right and Lightning is not: both behaviours, measured."""

from __future__ import annotations

import warnings

import pytest

from .differences import DIFFERENCES, PAGE, Difference, Side, table


@pytest.mark.filterwarnings("ignore:training_step returned None", "ignore:Nothing was trained")
@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: f"{d.rule}-{d.run.__name__}")
def test_both_behaviours(difference: Difference) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        theirs = difference.run(Side("lightning"))
    assert theirs == difference.theirs
    assert difference.run(Side("eventtrain")) == difference.ours
    assert difference.ours != difference.theirs


def test_the_table_in_the_documentation_is_fresh() -> None:
    assert table() in PAGE.read_text()
