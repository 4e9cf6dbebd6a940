"""Files and directories of a moment: gone at the end, whatever comes meanwhile."""

import os
from pathlib import Path

import pytest

from tetrarch._files import ScratchDirectory, replaced_when_whole


def test_scratch_goes_although_a_signal_comes_while_it_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unlink, interrupts = os.unlink, iter([KeyboardInterrupt])

    def interrupted(*arguments: object, **options: object) -> None:
        for interrupt in interrupts:
            raise interrupt
        unlink(*arguments, **options)  # type: ignore[arg-type]

    scratch = ScratchDirectory(dir=tmp_path)
    for name in ("one", "two"):
        (Path(scratch.name) / name).touch()
    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch:
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to("file")
    writing = replaced_when_whole(link)
    writing.__enter__().write(b"half")
    assert not writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 2)
    with replaced_when_whole(link) as file:
        file.write(b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert link.is_symlink()
    with replaced_when_whole(Path("/dev/null")) as file:
        file.write(b"gone")
    assert Path("/dev/null").is_char_device()
