"""The arithmetic of benchmarks/scale.py on cases known by hand, and its counted parameters against published ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scale
from scale import BY_NAME, NETWORK, NETWORK_HOP, NVLINK, NVLINK_HOP, Update

PUBLISHED = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684, "FLUX.1-dev": 11_901_408_320}  # of the released weights


@pytest.mark.parametrize(("name", "weights"), PUBLISHED.items())
def test_the_networks_are_the_published_ones(name, weights):
    frozen, trained = scale.counted(BY_NAME[name], rank=1)
    assert frozen == weights
    assert 0 < trained < frozen


def test_the_lora_of_sd15_by_hand():
    """16 blocks: self-attention 4 x 2c; cross-attention 2 x 2c for q and out, 2 x (768 + c) for k and v; times rank."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6
    by_hand = 128 * sum(8 * c + 4 * c + 2 * (768 + c) for c in widths)
    assert scale.counted(BY_NAME["SD 1.5"], rank=128)[1] == by_hand == 25_509_888


def test_the_lora_of_flux_by_hand():
    """19 blocks with q, k, v, out and 38 with q, k, v, all 3072 to 3072."""
    assert scale.counted(BY_NAME["FLUX.1-dev"], rank=16)[1] == 16 * (19 * 4 + 38 * 3) * 2 * 3072
    assert scale.gatherings(BY_NAME["FLUX.1-dev"]) == 19 + 38 + 1


def test_a_ring_by_hand():
    assert scale.all_reduce(1e9, 1) == scale.all_gather(1e9, 1) == 0
    assert scale.all_reduce(NVLINK, 2) == pytest.approx(1 + 2 * NVLINK_HOP)  # each sends its bytes once
    assert scale.all_gather(8 * NVLINK, 8, parts=3) == pytest.approx(7 + 3 * 7 * NVLINK_HOP)
    # two nodes: 15 steps a round, one of them over the network, which is the slowest link
    assert scale.all_reduce(16 * NETWORK, 16) == pytest.approx(30 + 2 * (14 * NVLINK_HOP + NETWORK_HOP))
    assert scale.all_gather(16 * NETWORK, 16, cards=8) == pytest.approx(15 / 8 + 14 * NVLINK_HOP + NETWORK_HOP)
    assert scale.bandwidth(64, cards=100) == NVLINK


def test_an_update_by_hand():
    update = Update(E=10, K=2, forward=1.0, replay=3.0)
    assert update.alone == 16
    assert update.sharded(0.5, overlap=False) == 16 + (10 + 4) * 0.5
    assert update.sharded(0.5, overlap=True) == 16  # hidden
    assert update.sharded(1.5, overlap=True) == 12 * 1.5 + 2 * 2  # hidden behind the backward alone
    assert update.sharded(2.5, overlap=True) == (10 + 2 * 2) * 2.5  # nothing but gathering
    assert scale.seconds(989e12 * 0.4) == pytest.approx(1)


def test_calls_are_those_of_the_presets():
    # t_min ~ U{1..20} of T = 50; K: erratum 3 of methods.py
    assert scale.calls("sd15-drtune") == (pytest.approx(50 - 9.5, abs=0.4), pytest.approx(4.05, abs=0.05))


def test_operations_of_a_small_network_by_hand():
    """FLUX with one block of each kind: every product of a call is counted, and a replay is dearer than two calls."""
    tiny = BY_NAME["FLUX.1-dev"].config | {"num_layers": 0, "num_single_layers": 1}
    model = replace(BY_NAME["FLUX.1-dev"], config=tiny)
    c, n, rank = 3072, 4096 + 512, 2
    block = n * c * (3 * c + 4 * c + 5 * c) + 2 * n * n * c + 3 * n * 2 * c * rank + c * 3 * c
    embed = 4096 * 64 * c + 512 * 4096 * c + 2 * (256 + c) * c + (768 + c) * c
    out = 2 * c * c + 4096 * c * 64
    forward, replay = scale.operations(model, rank)
    assert forward == pytest.approx(2 * (block + embed + out), rel=1e-6)
    assert 2 < replay / forward < 4


def test_ratios_are_of_updates_with_the_same_plan():
    assert scale.ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == (1.0, 0.5, 3.0)


def test_the_page_is_made_of_what_was_found():
    """With numbers that cannot be measured ones, so that each ratio is seen to come from its runs."""
    seconds = {scale.ONE: [8.0], scale.TWO: [10.0], scale.WHOLE: [15.0], scale.APART: [9.0]}
    measured = {"batch": 8, "updates": 2, "rounds": 1, "cores": 2, "machine": "x", "torch": "2", "seconds": seconds}
    measured["alone"] = {"bytes": 4e6, "all_reduce": 0.1, "gather": 0.001}
    text = "\n".join(scale.measured_tables(json.loads(json.dumps(measured))))
    for found in ("| **0.800** |", "| **0.889** |", "| **0.900** |", "| **1.500** |", "100.00 ms, 1.00%"):
        assert found in text
    assert "Not measured" in scale.measured_tables(None)[0]
