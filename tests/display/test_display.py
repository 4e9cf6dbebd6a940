"""Who watches a screen is told what changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrarch.devices.vga import PORT_BASE, Vga
from tetrarch.display import Display
from tetrarch.display import display as display_module
from tetrarch.display.changes import Changes, changed_tiles
from tetrarch.display.display import Shown
from tetrarch.display.frame import Cursor, Frame, Rect
from tetrarch.display.vga import VgaSource
from tetrarch.errors import MachineStateError


def frame(width: int, height: int, *marks: tuple[int, int]) -> Frame:
    points = bytearray(4 * width * height)
    for x, y in marks:
        points[4 * (y * width + x)] = 1
    return Frame(width, height, bytes(points))


class Source:
    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.parts: Sequence[Rect] | None = None
        self.fails = False
        self.looks = 0

    def still(self) -> Frame | None:
        if self.fails:
            raise MachineStateError("a mode of planes")
        return self.frame

    def look(self) -> Shown | None:
        self.looks += 1
        shown = self.still()
        return None if shown is None else (shown, self.parts)

    def cursor(self) -> Cursor | None:
        return None


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_module, "REFRESH_S", 0.0)


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 149), st.integers(0, 129)), max_size=8))
def test_tiles_that_differ_are_found(marks: set[tuple[int, int]]) -> None:
    found = list(changed_tiles(frame(150, 130), frame(150, 130, *marks)))
    assert {(rect.x // 64, rect.y // 64) for rect in found} == {
        (x // 64, y // 64) for x, y in marks
    }
    assert all(rect.within(Rect(0, 0, 150, 130)) == rect for rect in found)


rects = st.builds(Rect, *(st.integers(0, 400) for _ in range(4)))


@settings(deadline=None)
@given(st.lists(rects, max_size=6), st.lists(rects, max_size=6))
def test_changes_are_given_until_they_have_been_wanted(
    added: list[Rect], wanted: list[Rect]
) -> None:
    changes = Changes(330, 200)
    changes.add(*added)
    due = {
        (x, y)
        for rect in added
        if (part := rect.within(Rect(0, 0, 330, 200)))
        for x in range(part.x, part.x + part.width)
        for y in range(part.y, part.y + part.height)
    }
    got = set()
    for want in wanted:
        for part in changes.take(want):
            assert part.within(want) == part
            got |= {
                (x, y)
                for x in range(part.x, part.x + part.width)
                for y in range(part.y, part.y + part.height)
            }
        due -= {
            (x, y)
            for x, y in due
            if want.x <= x < want.x + want.width and want.y <= y < want.y + want.height
        }
        # Nothing is lost of what nobody has wanted yet.
        assert bool(changes) >= bool(due)
    rest = {
        (x, y)
        for part in changes.take(Rect(0, 0, 330, 200))
        for x in range(part.x, part.x + part.width)
        for y in range(part.y, part.y + part.height)
    }
    assert due <= rest
    assert not changes


def test_first_source_that_shows_something_is_shown() -> None:
    first, second = Source(), Source()
    display = Display([first, second])
    watcher = display.watch()
    assert watcher.look()[0] is display_module.NOTHING
    with pytest.raises(MachineStateError, match="shows nothing"):
        display.screen()
    second.frame = frame(70, 70)
    assert watcher.look()[0] is second.frame
    first.frame = frame(80, 80)
    shown, _ = watcher.look()
    assert shown is first.frame
    assert watcher.take(shown, shown.all) == [Rect(0, 0, 80, 64), Rect(0, 64, 80, 16)]
    first.fails = True
    assert watcher.look()[0] is shown


def test_each_watcher_gets_what_it_has_not_got() -> None:
    source = Source()
    source.frame = frame(200, 200)
    display = Display([source])
    one, other = display.watch(), display.watch()
    for watcher in (one, other):
        shown, _ = watcher.look()
        assert watcher.take(shown, shown.all)
    source.frame = frame(200, 200, (199, 0))
    shown, _ = one.look()
    assert one.take(shown, shown.all) == [Rect(192, 0, 8, 64)]
    assert one.take(shown, shown.all) == []
    source.frame, source.parts = frame(200, 200), [Rect(0, 150, 1, 1)]  # as it tells it
    shown, _ = one.look()
    assert one.take(shown, shown.all) == [Rect(0, 128, 64, 64)]
    assert other.take(shown, shown.all) == [Rect(192, 0, 8, 64), Rect(0, 128, 64, 64)]
    one.again(Rect(0, 0, 1, 1))
    assert one.take(shown, Rect(0, 0, 10, 10)) == [Rect(0, 0, 10, 10)]
    assert one.take(shown, shown.all) == [Rect(0, 0, 64, 64)]


def test_frame_of_another_size_is_wanted_whole() -> None:
    source = Source()
    source.frame = frame(64, 64)
    watcher = Display([source]).watch()
    old, _ = watcher.look()
    source.frame, source.parts = frame(100, 64), []
    new, _ = watcher.look()
    assert watcher.take(old, old.all) is None
    assert watcher.take(new, new.all) == [new.all]


def test_looks_are_rare_and_only_while_somebody_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(display_module, "REFRESH_S", 60.0)
    source = Source()
    source.frame = frame(64, 64)
    watchers = [Display([source]).watch() for _ in range(1)]
    display = Display([source])
    watchers += [display.watch(), display.watch()]
    assert source.looks == 0
    for _ in range(100):
        for watcher in watchers[1:]:
            watcher.look()
    assert source.looks == 1


def test_frame_is_cut_off_or_has_black_around_it() -> None:
    whole = Frame(2, 2, bytes(range(1, 17)))
    assert whole.of_size(2, 2) is whole
    assert whole.of_size(1, 3).points == bytes([1, 2, 3, 4, 9, 10, 11, 12, 0, 0, 0, 0])
    assert whole.of_size(3, 1).points == bytes([*range(1, 9), 0, 0, 0, 0])
    assert whole.screen().pixels == bytes([3, 2, 1, 7, 6, 5, 11, 10, 9, 15, 14, 13])


def test_cursor_of_text_is_for_who_watches() -> None:
    pytest.importorskip("tetrarch.display.font").pc_font()
    memory = bytearray(0x8000)
    memory[1::2] = b"\x07" * 0x4000
    vga = Vga()
    source = VgaSource(vga, lambda address, length: bytes(memory[:length]))
    shown = source.look()
    assert shown is not None
    again = source.look()
    assert again is not None
    assert again[0] is shown[0]
    row = 4 * 640
    # Of mode 3: lines 13 and 14 of the first cell.
    lit = [line for line in range(16) if any(shown[0].points[line * row :][:32])]
    assert lit == [13, 14]
    picture = source.still()
    assert picture is not None
    assert not any(picture.points)
    for index, value in ((0x0E, 80 >> 8), (0x0F, 80)):
        vga.write(0x3D4 - PORT_BASE, 1, index)
        vga.write(0x3D5 - PORT_BASE, 1, value)
    moved = source.look()
    assert moved is not None
    assert list(changed_tiles(shown[0], moved[0])) == [Rect(0, 0, 64, 64)]
    vga.write(0x3D4 - PORT_BASE, 1, 0x0A)
    vga.write(0x3D5 - PORT_BASE, 1, 0x20)
    off = source.look()
    assert off is not None
    assert not any(off[0].points)
