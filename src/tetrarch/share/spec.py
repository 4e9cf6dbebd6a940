"""A directory for the guest as it is written down: ``DIR[:TAG][,readonly]``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tetrarch._words import options, split
from tetrarch.errors import ValueProblem

__all__ = ["ShareSpec", "share_tags"]

#: What a shell and a kernel's command line take as it is, of as many bytes as virtio 1.2, 5.11.4
#: has for it.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,35}")


@dataclass(frozen=True)
class ShareSpec:
    directory: Path
    tag: str | None = None
    """What the guest mounts it by; None: the directory's name where that can be one."""
    readonly: bool = False
    """The host sees to it, whatever the guest does."""

    def __post_init__(self) -> None:
        if self.tag is not None and not _TAG.fullmatch(self.tag):
            raise ValueProblem(
                f"{self.tag!r} is no tag", mend="use up to 36 letters, digits, '.', '_' and '-'"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueProblem. A comma in the path is written twice; of several colons the last
        one counts, if no '/' is behind it."""
        place, *words = split(text)
        readonly = False
        for _, value in options(words, ["readonly"], "a share"):
            if value not in (None, "on", "off"):
                raise ValueProblem(f"readonly is {value!r}", mend="write on or off")
            readonly = value != "off"
        directory, colon, tag = place.rpartition(":")
        if not colon or "/" in tag:
            directory, tag = place, ""
        if not directory or "\0" in text:
            raise ValueProblem(f"{text!r} names no directory", mend="write DIR[:TAG][,readonly]")
        return cls(Path(directory), tag or None, readonly)

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        return replace(self, directory=directory / self.directory)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ":" if ":" in self.directory.name else ""
        place = f"{self.directory}{tag}".replace(",", ",,")
        return f"{place},readonly" if self.readonly else place


def share_tags(shares: Sequence[ShareSpec]) -> list[str]:
    """The tag of each. Raises ValueProblem where two are to have the same."""
    given = [share.tag for share in shares if share.tag is not None]
    for tag in given:
        if given.count(tag) > 1:
            raise ValueProblem(f"two shares have the tag {tag!r}", mend="name one otherwise")
    taken = set(given)
    tags = []
    for index, share in enumerate(shares):
        if share.tag is not None:
            tags.append(share.tag)
            continue
        # As resolve() does, but for links in a circle: those are refused when they are opened.
        name = os.path.basename(os.path.realpath(share.directory))
        free = _TAG.fullmatch(name) is not None and name not in taken
        tags.append(name if free else f"share{index}")
        if tags[-1] in taken:
            raise ValueProblem(f"{share} has no tag that is free", mend="give it one, as DIR:TAG")
        taken.add(tags[-1])
    return tags
