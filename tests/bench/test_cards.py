"""What the benchmark of network cards concludes."""

from __future__ import annotations

import pytest
from tools.bench.cards import WAYS, mean_ratio


def test_ratio_is_the_mean_of_both_ways() -> None:
    figures = {(way, "virtio"): 1000.0 for way in WAYS}
    figures |= {(way, "vmxnet3"): 500.0 for way in WAYS}
    assert mean_ratio(figures) == pytest.approx(0.5)
    # A card without a goal.
    figures |= {(way, "e1000"): 1.0 for way in WAYS}
    figures["--reverse", "vmxnet3"] = 2000.0
    assert mean_ratio(figures) == pytest.approx(1.0)
