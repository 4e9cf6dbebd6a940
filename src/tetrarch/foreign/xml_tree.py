"""XML as a tree with line numbers, for descriptions that anybody may have written.

A document type is refused, and with it entities, which could grow without bound or name files
(XML 1.0, 4.3.2 and 4.4); so are trees that are deeper than any description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from tetrarch.errors import ConfigError

__all__ = ["Element", "parse_xml"]

_DEPTH_MAX = 64


@dataclass(eq=False)
class Element:
    """A tag with what it holds. What reads it takes attributes and children out."""

    tag: str
    line: int
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts).strip()

    def take(self, tag: str) -> Element | None:
        """The first child of that name, taken out."""
        return next(self.take_all(tag, 1), None)

    def take_all(self, tag: str, most: int = 1 << 30) -> Iterator[Element]:
        """The children of that name, taken out."""
        found = [child for child in self.children if child.tag == tag][:most]
        taken = set(map(id, found))
        self.children = [child for child in self.children if id(child) not in taken]
        return iter(found)

    def take_text(self, tag: str) -> str | None:
        child = self.take(tag)
        return None if child is None else child.text

    def attribute(self, name: str, default: str = "") -> str:
        """Taken out."""
        return self.attributes.pop(name, default)


class _Builder:
    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.StartDoctypeDeclHandler = self._doctype
        self._open: list[Element] = []
        self.root: Element | None = None

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        element = Element(tag, self.parser.CurrentLineNumber, attributes)
        if len(self._open) == _DEPTH_MAX:
            raise ConfigError(
                f"line {element.line}: the tags are more than {_DEPTH_MAX} deep", mend="correct it"
            )
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def _end(self, tag: str) -> None:
        self._open.pop()

    def _text(self, text: str) -> None:
        if self._open:
            self._open[-1].parts.append(text)

    def _doctype(self, *what: object) -> None:
        raise ConfigError("a document type is refused", mend="remove the line with <!DOCTYPE")


def parse_xml(text: str) -> Element:
    """The outermost element. Raises ConfigError."""
    builder = _Builder()
    try:
        builder.parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise ConfigError(f"this is no XML: {error}", mend="correct it") from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"this is no XML: {error}", mend="correct it") from error
    except (LookupError, ValueError) as error:  # an encoding that nobody knows, or not here
        raise ConfigError(f"this is no XML: {error}", mend="write it in UTF-8") from error
    if builder.root is None:
        raise ConfigError("this is no XML: it is empty", mend="correct it")
    return builder.root
