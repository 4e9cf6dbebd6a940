"""What the benchmark of disk controllers concludes."""

from __future__ import annotations

import pytest
from tools.bench.buses import KINDS, mean_ratio


def test_ratio_is_the_mean_of_all_rows() -> None:
    figures = {(kind, "virtio"): 1000.0 for kind, _ in KINDS}
    figures |= {(kind, "pvscsi"): 500.0 for kind, _ in KINDS}
    assert mean_ratio(figures) == pytest.approx(0.5)
    (first, _), (second, _), *_ = KINDS
    figures[first, "pvscsi"] = figures[second, "pvscsi"] = 2000.0
    assert mean_ratio(figures) == pytest.approx(1.0)
