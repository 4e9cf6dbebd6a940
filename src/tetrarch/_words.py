"""Options as words: ``NAME[,OPTION=VALUE]...``."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from tetrarch.errors import ValueProblem

__all__ = ["one_of", "options", "shown", "split"]


def split(text: str) -> list[str]:
    """At single commas: a doubled one is a comma of the part."""
    return [part.replace("\0\0", ",") for part in text.replace(",,", "\0\0").split(",")]


def options(
    words: Collection[str], known: Collection[str], of: str, *, many: Collection[str] = ()
) -> Iterator[tuple[str, str | None]]:
    """Names and values. Raises ValueProblem for a name that ``of`` has not, or that is there
    twice and is not one of ``many``."""
    seen = set()
    for word in words:
        name, equals, value = word.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {near[0]}?" if near else _there(known)
            raise ValueProblem(f"{word!r} is no option of {of}", mend=mend)
        if name in seen and name not in many:
            raise ValueProblem(f"{name} is given twice", mend="give it once")
        seen.add(name)
        yield name, value if equals else None


def one_of(name: str, value: str | None, choices: Collection[str]) -> str:
    if value is None or value not in choices:
        raise ValueProblem(f"{name} is {shown(value)}", mend=_there(choices))
    return value


def _there(choices: Collection[str]) -> str:
    return f"there {'is' if len(choices) == 1 else 'are'} {', '.join(choices)}"


def shown(value: str | None) -> str:
    return "nothing" if value is None else repr(value)
