"""A strict reader of what booting needs from an ELF file of either class: segments and notes."""

import struct
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.layout import align_up
from tetrarch.boot.source import Source

__all__ = ["MAGIC", "PT_LOAD", "Elf", "Segment", "parse_elf"]

MAGIC: Final = b"\x7fELF"
CLASS_32: Final = 1
CLASS_64: Final = 2
DATA_LSB: Final = 1
ET_EXEC: Final = 2
ET_DYN: Final = 3
EM_386: Final = 3
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4
EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR: Final = struct.Struct("<IIQQQQQQ")
EHDR_32: Final = struct.Struct("<16sHHIIIIIHHHHHH")
PHDR_32: Final = struct.Struct("<IIIIIIII")
#: Linux has five program headers; a bound keeps a damaged file from costing time.
MAX_SEGMENTS: Final = 256
#: Linux's .notes has a few hundred bytes.
MAX_NOTES_BYTES: Final = 1 << 20
#: Sizes of name and content, and the type (gABI, "Note Section").
NOTE_HEADER: Final = 12


@dataclass(frozen=True, slots=True)
class Segment:
    type: int
    offset: int
    virtual: int
    physical: int
    file_size: int
    memory_size: int
    alignment: int


@dataclass(frozen=True, slots=True)
class Elf:
    entry: int
    segments: tuple[Segment, ...]
    source: Source

    @property
    def loads(self) -> list[Segment]:
        return [s for s in self.segments if s.type == PT_LOAD and s.memory_size]

    @property
    def physical_entry(self) -> int:
        """The entry as an address where the file is loaded: some name one of the kernel's own."""
        for one in self.loads:
            offset = self.entry - one.virtual
            if 0 <= offset < one.memory_size:
                return one.physical + offset
        return self.entry

    def find_note(self, name: bytes, kind: int) -> bytes | None:
        """The content of a note.

        It is looked for at each multiple of 4 in the note segments, not by walking from note
        to note: notes may be aligned to 4 in a segment that says 8, and a damaged note that
        nobody wants must not hide the others.
        """
        wanted = struct.pack("<I", kind) + name + b"\0"
        for segment in self.segments:
            if segment.type != PT_NOTE:
                continue
            size = min(segment.file_size, MAX_NOTES_BYTES)
            data = self.source.read(segment.offset, size)
            for at in range(0, len(data) - 12, 4):
                name_size, desc_size = struct.unpack_from("<II", data, at)
                start = at + NOTE_HEADER + align_up(len(name) + 1, 4)
                whole = name_size == len(name) + 1 and start + desc_size <= len(data)
                if whole and data.startswith(wanted, at + 8):
                    return data[start : start + desc_size]
        return None


def parse_elf(source: Source) -> Elf:
    """Checks the headers; every segment returned lies within the file."""
    ident = source.read(0, min(source.size, EHDR.size))
    narrow = ident[4:5] == bytes([CLASS_32])
    ehdr, phdr = (EHDR_32, PHDR_32) if narrow else (EHDR, PHDR)
    if ident[:4] != MAGIC:
        raise source.error("is not an ELF file", mend="name a vmlinux")
    if len(ident) < ehdr.size:
        raise source.error("is cut short within its ELF header", mend="get the file again")
    if ident[4] not in (CLASS_32, CLASS_64) or ident[5] != DATA_LSB:
        raise source.error("is not a little-endian ELF file", mend="use an x86 kernel")
    header = ehdr.unpack(ident[: ehdr.size])
    (_, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _) = header
    if machine not in (EM_386, EM_X86_64):
        raise source.error(
            f"is for another processor (ELF machine {machine})", mend="use an x86-64 one"
        )
    if kind not in (ET_EXEC, ET_DYN):
        raise source.error("is an ELF file, but no executable", mend="name a vmlinux")
    if phentsize != phdr.size or not 0 < phnum <= MAX_SEGMENTS:
        raise source.error("has no usable ELF program headers", mend="name a linked vmlinux")
    table = source.read(phoff, phnum * phdr.size)
    segments = []
    for fields in phdr.iter_unpack(table):
        if narrow:
            p_type, offset, virtual, physical, file_size, memory_size, _, alignment = fields
        else:
            p_type, _, offset, virtual, physical, file_size, memory_size, alignment = fields
        if p_type in (PT_LOAD, PT_NOTE) and offset + file_size > source.size:
            raise source.error(
                f"is cut short: {offset + file_size} bytes are needed, it has {source.size}",
                mend="get the file again",
            )
        if p_type == PT_LOAD and file_size > memory_size:
            raise source.error(
                "has a segment larger in the file than in memory",
                mend="get the file again, it is damaged",
            )
        segments.append(
            Segment(p_type, offset, virtual, physical, file_size, memory_size, alignment)
        )
    return Elf(entry, tuple(segments), source)
