"""Archives that a guest sends which is not what it was asked for."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from tetrarch.agent.copy import extract
from tetrarch.errors import HostError


def archive(*members: tuple[str, bytes, str]) -> tarfile.TarFile:
    """Of (name, type, target or content)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as made:
        for name, kind, text in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(text)
                made.addfile(member, io.BytesIO(text.encode()))
            else:
                member.linkname = text
                made.addfile(member)
    return tarfile.open(fileobj=io.BytesIO(data.getvalue()), mode="r|")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../out", "./a/../../out", "other", "a/../out", "", "."]
)
def test_names_of_what_was_not_asked_for_are_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / "in" / "a"
    place.parent.mkdir()
    with pytest.raises(HostError, match="not asked for"):
        extract(archive((name, tarfile.REGTYPE, "x")), "a", place, [])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "in" / "a"
    place.parent.mkdir()
    left_out: list[str] = []
    members = archive(
        ("a", tarfile.DIRTYPE, ""),
        ("a/link", tarfile.SYMTYPE, str(outside)),
        ("a/up", tarfile.SYMTYPE, "../../outside"),
        ("a/link/file", tarfile.REGTYPE, "x"),
        ("a/up/file", tarfile.REGTYPE, "x"),
    )
    extract(members, "a", place, left_out)
    assert left_out == ["a/link", "a/up"]
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    "members",
    [
        [("a", tarfile.SYMTYPE, "mine"), ("a", tarfile.REGTYPE, "x")],
        [
            ("a", tarfile.DIRTYPE, ""),
            ("a/b", tarfile.SYMTYPE, "../mine"),
            ("a/b", tarfile.REGTYPE, "x"),
        ],
        [
            ("a", tarfile.DIRTYPE, ""),
            ("a/b", tarfile.SYMTYPE, ".."),
            ("a/b/mine", tarfile.REGTYPE, "x"),
        ],
        [
            ("a", tarfile.DIRTYPE, ""),
            ("a/b", tarfile.SYMTYPE, ".."),
            ("a/c", tarfile.LNKTYPE, "a/b/mine"),
            ("a/c", tarfile.REGTYPE, "x"),
        ],
        [("a", tarfile.SYMTYPE, "."), ("a/mine", tarfile.REGTYPE, "x")],
    ],
)
def test_what_lies_beside_stays_as_it_is(
    tmp_path: Path, members: list[tuple[str, bytes, str]]
) -> None:
    (tmp_path / "mine").write_text("mine")
    with suppress(HostError, KeyError):
        extract(archive(*members), "a", tmp_path / "a", [])
    assert (tmp_path / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "mine"}


def test_nothing_is_written_through_a_link_that_stays_inside(tmp_path: Path) -> None:
    members = archive(
        ("a", tarfile.DIRTYPE, ""),
        ("a/sub", tarfile.DIRTYPE, ""),
        ("a/b", tarfile.SYMTYPE, "sub"),
        ("a/b/c", tarfile.REGTYPE, "x"),
    )
    with pytest.raises(HostError, match=r"behind the link .*/a/b"):
        extract(members, "a", tmp_path / "a", [])


def test_a_link_takes_the_place_of_a_file_and_a_file_that_of_a_link(tmp_path: Path) -> None:
    for first, second in ((tarfile.SYMTYPE, tarfile.REGTYPE), (tarfile.REGTYPE, tarfile.SYMTYPE)):
        for kind in (first, second):
            members = archive(
                ("a", tarfile.DIRTYPE, ""),
                ("a/other", tarfile.REGTYPE, "text"),
                ("a/b", kind, "other"),
            )
            extract(members, "a", tmp_path / "a", [])
        assert (tmp_path / "a" / "b").is_symlink() == (second == tarfile.SYMTYPE)
        assert (tmp_path / "a" / "other").read_text() == "text"


def test_the_link_that_the_user_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to("elsewhere/file")
    extract(archive(("b", tarfile.REGTYPE, "x")), "b", tmp_path / "a", [])
    assert (tmp_path / "elsewhere" / "file").read_text() == "x"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(HostError, match="not asked for"):
        extract(archive(("a", kind, "")), "a", tmp_path / "a", [])
    assert list(tmp_path.iterdir()) == []


def test_hard_link_to_a_file_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in").mkdir()
    with pytest.raises(HostError, match="not asked for"):
        extract(archive(("a/b", tarfile.LNKTYPE, "../secret")), "a", tmp_path / "in" / "a", [])
