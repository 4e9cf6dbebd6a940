"""Container images in a directory, as the OCI image layout has them.

The specification is at github.com/opencontainers/image-spec (image-layout.md, image-index.md,
manifest.md, config.md). Every blob is checked against its digest before it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from tetrarch._files import read_bounded
from tetrarch.errors import ImageError
from tetrarch.images.tool import find_tool

__all__ = ["OciImage", "open_layer", "read_image"]

_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]{64,128})")
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_REFERENCE = "org.opencontainers.image.ref.name"
_ZSTD = bytes.fromhex("28b52ffd")
#: An index in an index in an index is nothing that a tool writes.
_DEPTH_MAX = 3
#: As containerd and skopeo take it.
_JSON_MAX = 4 << 20
_MEND = "make the layout anew, as with: skopeo copy docker://NAME oci:DIR"


@dataclass(frozen=True)
class OciImage:
    """An image for Linux on x86-64."""

    layers: list[Path]
    arguments: list[str] = field(default_factory=list)
    """Of its command; empty: it has none."""
    environment: list[str] = field(default_factory=list)
    directory: str = ""
    time: int = 1
    """When it was made, in seconds since 1970."""


def read_image(directory: Path, tag: str = "") -> OciImage:
    """The image of a layout, of several the one with the tag. Raises ImageError."""
    layout = _Layout(directory)
    layout.check()
    manifest = layout.manifest(tag)
    try:
        config = layout.json(manifest["config"])
        layers = [layout.blob(layer) for layer in manifest["layers"]]
        run = config.get("config") or {}
        lists = [run.get(name) or [] for name in ("Entrypoint", "Cmd", "Env")]
        directory_there = run.get("WorkingDir") or ""
    except (KeyError, TypeError, AttributeError) as error:
        raise layout.damaged("its manifest or configuration lacks a part") from error
    if not all(isinstance(texts, list) for texts in lists):
        raise layout.damaged("its configuration has no list where one is to be")
    if not all(map(_is_text, [directory_there, *(text for texts in lists for text in texts)])):
        raise layout.damaged("its configuration has what is no text")
    entrypoint, command, environment = lists
    words = [*entrypoint, *command]
    return OciImage(layers, words, environment, directory_there, _time(config.get("created")))


@contextmanager
def open_layer(path: Path) -> Iterator[IO[bytes]]:
    """A layer's archive; what tarfile cannot unpack is unpacked."""
    with path.open("rb") as file:
        if file.read(len(_ZSTD)) != _ZSTD:
            file.seek(0)
            yield file
            return
    command = [find_tool("zstd", "zstd"), "-dcq", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        yield process.stdout


class _Layout:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self) -> None:
        version = self._load(self._directory / "oci-layout").get("imageLayoutVersion")
        if not str(version).startswith("1."):
            raise self.damaged(f"its version is {version}")

    def manifest(self, tag: str) -> dict[str, Any]:
        index = self._load(self._directory / "index.json")
        for _ in range(_DEPTH_MAX):
            chosen = self._choose(index, tag)
            index, tag = self.json(chosen), ""
            if "manifests" not in index and chosen.get("mediaType") not in _INDEXES:
                return index
        raise self.damaged("its indexes name each other")

    def _choose(self, index: dict[str, Any], tag: str) -> dict[str, Any]:
        """The entry for us. Those without a platform are for any."""
        found = []
        for entry in self._list(index, "manifests"):
            platform = entry.get("platform") or {}
            if not isinstance(platform, dict):
                raise self.damaged("an index has a platform that is none")
            named = _annotations(entry).get(_REFERENCE)
            fits = platform.get("os", "linux") == "linux"
            fits = fits and platform.get("architecture", "amd64") == "amd64"
            if fits and (not tag or named == tag):
                found.append(entry)
        if not found:
            what = f"no image {tag!r}" if tag else "no image"
            tags = _tags(self._list(index, "manifests"))
            raise ImageError(
                f"{self._directory} has {what} for Linux on amd64",
                f"it has {', '.join(tags)}" if tag and tags else _MEND,
            )
        if len(found) > 1:
            several = ", ".join(_tags(found)) or "without tags"
            raise ImageError(
                f"{self._directory} has several images: {several}", "write oci:DIR:TAG"
            )
        return found[0]

    def _list(self, values: dict[str, Any], name: str) -> list[dict[str, Any]]:
        found = values.get(name)
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise self.damaged(f"an index has no {name}")
        return found

    def json(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return self._load(self.blob(descriptor))

    def blob(self, descriptor: dict[str, Any]) -> Path:
        """Its file, after a look at all of it."""
        digest = str(descriptor.get("digest"))
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise self.damaged(f"{digest[:80]!r} is no digest")
        path = self._directory / "blobs" / match[1] / match[2]
        try:
            if not path.is_file():  # a FIFO would be waited for
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            with path.open("rb") as file:
                found = hashlib.file_digest(file, match[1]).hexdigest()
        except OSError as error:
            raise self.damaged(f"{path.name[:12]}: {error.strerror}") from error
        if found != match[2]:
            raise self.damaged(f"the blob {match[2][:12]} has another digest")
        return path

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(read_bounded(path, _JSON_MAX))
        except OSError as error:
            raise self.damaged(f"{path.name}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{path.name[:12]} is no JSON") from error
        if not isinstance(values, dict):
            raise self.damaged(f"{path.name[:12]} is no JSON object")
        return values

    def damaged(self, how: str) -> ImageError:
        return ImageError(f"{self._directory} is no OCI image layout: {how}", _MEND)


def _tags(entries: list[dict[str, Any]]) -> list[str]:
    found = (_annotations(entry).get(_REFERENCE) for entry in entries)
    return sorted({str(tag) for tag in found if tag is not None})


def _annotations(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("annotations")
    return found if isinstance(found, dict) else {}


def _is_text(value: object) -> bool:
    """As a command and its environment can have it."""
    return isinstance(value, str) and "\0" not in value


def _time(created: object) -> int:
    """RFC 3339; 1 where there is none that can be a file's time."""
    try:
        # Python reads no more than microseconds.
        text = re.sub(r"(\.\d{6})\d+", r"\1", str(created))
        return max(1, int(datetime.fromisoformat(text).timestamp()))
    except (ValueError, OverflowError):
        return 1
