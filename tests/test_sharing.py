"""benchmarks/sharing.py: the ways in which a tuned network samples, and what its table says of known rows."""

from __future__ import annotations

import sharing

from rewardtune.mixing import Mix


def test_early_and_late_are_complements():
    late, early = Mix(base_steps=16), sharing.Early(base_steps=16)
    assert [late.base_weight(i, 20) + early.base_weight(i, 20) for i in range(20)] == [1.0] * 20
    assert early.base_weight(15, 20) == 0.0


def test_the_table_pairs_changes_by_seed():
    """Symmetry falls by 0.1 throughout and by 0.01 by the last step alone; the level of a seed drops out."""

    def row(seed: int) -> dict:
        level = 0.5 + 0.1 * seed
        ways = dict(zip(sharing.WAYS, (level, level - 0.1, level - 0.01, level - 0.09), strict=True))
        scores = {way: {"symmetry": value, "clipscore": 0.7} for way, value in ways.items()}
        return {"run": "DRaFT-LV", "seed": seed, "n": 1, "lr": 9e-4, "updates": 90, "count": 128, "scores": scores}

    heading, _, symmetry, clipscore = sharing.table([row(seed) for seed in (2, 0, 1)])
    found = dict(zip(heading.split(" | "), symmetry.split(" | "), strict=True))
    assert found["untuned"] == "0.600 ± 0.100"
    assert found["change throughout"] == "-0.100 ± 0.000"
    assert found["change by the last n alone |"] == "-0.010 ± 0.000 |"
    assert "+0.000 ± 0.000" in clipscore
