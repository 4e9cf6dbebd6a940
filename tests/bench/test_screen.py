"""What the benchmark of screens counts, and that those of devices write their sections."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import ModuleType

import pytest
from tools.bench import buses, cards, report, screen
from tools.bench.__main__ import BENCHMARKS
from tools.bench.report import BenchError
from tools.bench.viewer import Counter

from tetrarch.display import Display
from tetrarch.display.frame import Frame
from tetrarch.vnc.hands import Hands
from tetrarch.vnc.server import VncServer
from tetrarch.vnc.spec import DisplaySpec


class Scrolling:
    """A screen that is another one each time."""

    def __init__(self) -> None:
        self.looks = itertools.count()

    def still(self) -> Frame:
        return Frame(640, 400, bytes([next(self.looks) % 256]) * (4 * 640 * 400))

    def look(self) -> tuple[Frame, None]:
        return self.still(), None

    def cursor(self) -> None:
        return None


def test_viewer_counts_each_update_once(tmp_path: Path) -> None:
    source, spec = Scrolling(), DisplaySpec.parse(f"vnc={tmp_path / 'vnc'}")
    server = VncServer("box", Display([source]), Hands(()), spec)
    try:
        counter = Counter(server.address)
        assert (counter.width, counter.height) == (640, 400)
        before = next(source.looks)
        updates, taken = counter.count(1.0)
        looked = next(source.looks) - before
        counter.close()
    finally:
        server.close()
    assert 1 <= updates <= looked + 1
    assert taken > 16 * updates


def test_lines_are_counted_by_the_guests_own_clock() -> None:
    said = "for one in; do echo lines $n\r\nlines 1200 10.50 14.50\r\nroot@tetrarch:~# "
    assert screen.lines_a_second(said) == 300
    with pytest.raises(BenchError, match="the guest says no lines"):
        screen.lines_a_second("sh: syntax error")


FIGURES = {
    buses: {(kind, bus): 1000.0 for kind, _ in buses.KINDS for bus in buses.BUSES},
    cards: {(way, model): 1000.0 for way in cards.WAYS for model in cards.MODELS},
    screen: {(row, kind): 1000.0 for row in screen.ROWS for kind in screen.SCREENS},
}


@pytest.mark.parametrize("benchmark", FIGURES, ids=lambda module: module.__name__)
def test_each_writes_its_section(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(name for name, module in BENCHMARKS.items() if module is benchmark)
    document = tmp_path / "benchmarks.md"
    monkeypatch.setattr(benchmark, "_measure", lambda *given: FIGURES[benchmark])
    monkeypatch.setattr(
        benchmark, "write_section", lambda name, text: report.write_section(name, text, document)
    )
    # What they need of the host.
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(screen, "VGA_BIOS", tmp_path)
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    assert benchmark.run(parser.parse_args([])) == 0
    written = document.read_text()
    assert written.count(f"<!-- {name}: begin -->\n## ") == 1
    assert f"`python -m tools.bench {name}`" in written
    assert "1,000" in written
    assert "Host CPU" in written
    # Machine-readable output stays out of the document.
    document.unlink()
    benchmark.run(parser.parse_args(["--json"]))
    assert not document.exists()
