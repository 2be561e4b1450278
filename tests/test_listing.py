"""`rewardtune ls`: what it prints can be read in a terminal of 100 columns, and nothing is lost by wrapping."""

import pytest

from rewardtune import methods
from rewardtune.listing import LISTED, SECTIONS, listing


@pytest.mark.parametrize("name", SECTIONS)
def test_lines_fit_and_hold_everything(name: str) -> None:
    shown = listing([name])
    assert max(map(len, shown.splitlines())) <= LISTED
    words = " ".join(shown.split())
    for left, right in SECTIONS[name]():
        assert f"{left} {' '.join(right.split())}" in words


def test_a_method_with_its_options_stands_in_one_line() -> None:
    lines = [line.strip() for line in listing(["methods"]).splitlines()]
    assert [line.partition("(")[0] for line in lines if line.endswith(")")][: len(methods.ALL)] == [*methods.ALL]
    assert "drtune(K=5, m=20, spacing=chain, input_gradient=0.0, stops=1)" in lines
