"""Shares as they are written down."""

from pathlib import Path

import pytest

from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.config import make_config
from tetrarch.share import ShareSpec, share_tags


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("data", ShareSpec(Path("data"))),
        ("/srv/data:src,readonly", ShareSpec(Path("/srv/data"), "src", readonly=True)),
        ("/a,,b:c/d", ShareSpec(Path("/a,b:c/d"))),
        ("/a:b:", ShareSpec(Path("/a:b"))),
        ("/a:b:c,readonly=off", ShareSpec(Path("/a:b"), "c")),
    ],
)
def test_share_is_what_is_written_and_written_as_it_is(text: str, spec: ShareSpec) -> None:
    assert ShareSpec.parse(text) == spec
    assert ShareSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "cause", "mend"),
    [
        ("", "names no directory", "write DIR[:TAG][,readonly]"),
        (":tag", "names no directory", "write DIR"),
        ("d\0", "names no directory", "write DIR"),
        ("d:a b", "'a b' is no tag", "up to 36 letters"),
        ("d:-x", "'-x' is no tag", "up to 36 letters"),
        ("d:" + 37 * "x", "is no tag", "up to 36 letters"),
        ("d,ro", "'ro' is no option of a share", "there is readonly"),
        ("d,readonly=yes", "readonly is 'yes'", "write on or off"),
    ],
)
def test_what_is_no_share_is_refused_with_cause_and_mend(text: str, cause: str, mend: str) -> None:
    with pytest.raises(ValueProblem) as problem:
        ShareSpec.parse(text)
    assert cause in problem.value.cause
    assert mend in problem.value.mend


def test_tag_is_the_name_of_the_directory_where_it_can_be_one() -> None:
    texts = ["/srv/data", "/srv/a b", "/other/data", "/x:share9", "/"]
    assert share_tags([ShareSpec.parse(text) for text in texts]) == [
        "data",
        "share1",
        "share2",
        "share9",
        "share4",
    ]


@pytest.mark.parametrize(
    ("shares", "cause"),
    [
        (["a:x", "b:x"], "two shares have the tag 'x'"),
        (["a:share1", "/b c"], "/b c has no tag that is free"),
        ([7], "7 is no share"),
    ],
)
def test_tags_that_are_one_are_refused(shares: list[object], cause: str) -> None:
    with pytest.raises(ConfigError, match=f"share: {cause}"):
        make_config({"share": shares})
