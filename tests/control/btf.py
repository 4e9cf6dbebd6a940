"""The types of a Linux kernel by its own description, BTF (Linux, Documentation/bpf/btf.rst), for
drgn: a core dump of a kernel is read without hundreds of megabytes of debug symbols."""

# Without types: drgn is installed for the long tests alone.
# mypy: ignore-errors

from __future__ import annotations

import struct
from collections import defaultdict

import drgn

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC = range(1, 13)
FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(13, 20)
_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
# What follows the head of a type: words, and words for each of its parts.
_WORDS = {INT: 1, ARRAY: 3, VAR: 1, DECL_TAG: 1}
_PART_WORDS = {STRUCT: 3, UNION: 3, ENUM: 2, FUNC_PROTO: 2, DATASEC: 3, ENUM64: 3}
_FINDABLE = {
    drgn.TypeKind.INT: INT,
    drgn.TypeKind.BOOL: INT,
    drgn.TypeKind.STRUCT: STRUCT,
    drgn.TypeKind.UNION: UNION,
    drgn.TypeKind.ENUM: ENUM,
    drgn.TypeKind.TYPEDEF: TYPEDEF,
}


class Btf:
    def __init__(self, prog: drgn.Program, data: bytes) -> None:
        self._prog = prog
        magic, _, _, head, type_at, type_len, text_at, text_len = _HEADER.unpack_from(data)
        assert magic == _MAGIC
        self._text = data[head + text_at : head + text_at + text_len]
        words = struct.unpack(
            f"<{type_len // 4}I", data[head + type_at : head + type_at + type_len]
        )
        self._heads = [(0, 0, 0, ())]
        self._made = {0: prog.void_type()}
        self._named = defaultdict(list)
        at = 0
        while at < len(words):
            name, info, size = words[at : at + 3]
            kind, count = info >> 24 & 31, info & 0xFFFF
            more = _WORDS.get(kind, 0) + count * _PART_WORDS.get(kind, 0)
            self._named[self._string(name)].append(len(self._heads))
            self._heads.append((name, info, size, words[at + 3 : at + 3 + more]))
            at += 3 + more

    def find(self, prog, kinds, name, filename):
        wanted = {_FINDABLE[kind] for kind in kinds if kind in _FINDABLE}
        for number in self._named.get(name, ()):
            if self._heads[number][1] >> 24 & 31 in wanted:
                return self.type(number)
        return None

    def type(self, number: int) -> drgn.Type:
        if number not in self._made:
            self._made[number] = self._make(number)
        return self._made[number]

    def _string(self, at: int) -> str:
        return self._text[at : self._text.index(b"\0", at)].decode()

    def _make(self, number: int) -> drgn.Type:
        prog, (name_at, info, size, words) = self._prog, self._heads[number]
        name, kind, flag = self._string(name_at), info >> 24 & 31, info >> 31
        match kind:
            case _ if kind == INT:
                if name == "_Bool":
                    return prog.bool_type(name, size)
                return prog.int_type(name, size, bool(words[0] >> 24 & 1))
            case _ if kind == FLOAT:
                return prog.float_type(name, size)
            case _ if kind == PTR:
                return prog.pointer_type(self.type(size))
            case _ if kind == ARRAY:
                return prog.array_type(self.type(words[0]), words[2])
            case _ if kind in (STRUCT, UNION):
                make = prog.struct_type if kind == STRUCT else prog.union_type
                members = [self._member(words[at : at + 3], flag) for at in range(0, len(words), 3)]
                return make(name or None, size, members)
            case _ if kind == FWD:
                make = prog.union_type if flag else prog.struct_type
                return make(name)
            case _ if kind in (ENUM, ENUM64):
                return self._enum(name, kind, size, words)
            case _ if kind == TYPEDEF:
                return prog.typedef_type(name, self.type(size))
            case _ if kind == CONST:
                return self.type(size).qualified(drgn.Qualifiers.CONST)
            case _ if kind == VOLATILE:
                return self.type(size).qualified(drgn.Qualifiers.VOLATILE)
            case _ if kind in (RESTRICT, TYPE_TAG):
                return self.type(size)
            case _ if kind == FUNC_PROTO:
                return prog.function_type(self.type(size), ())
        raise AssertionError(f"a type of kind {kind}")

    def _member(self, words, packed: int) -> drgn.TypeMember:
        name, number, offset = words
        bits = offset >> 24 if packed else 0

        def thunk() -> drgn.Object | drgn.Type:
            made = self.type(number)
            return drgn.Object(self._prog, made, bit_field_size=bits) if bits else made

        return drgn.TypeMember(
            thunk, self._string(name) or None, offset & 0xFFFFFF if packed else offset
        )

    def _enum(self, name: str, kind: int, size: int, words) -> drgn.Type:
        step = _PART_WORDS[kind]
        values = [
            drgn.TypeEnumerator(self._string(words[at]), words[at + 1])
            for at in range(0, len(words), step)
        ]
        return self._prog.enum_type(
            name or None, self._prog.int_type("unsigned int", size, False), values
        )


def add_types(prog: drgn.Program) -> None:
    """Gives a kernel its types, and those variables that lists of tasks begin at."""
    from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

    prog.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(prog), enable_index=0)
    start, end = (prog.symbol(f"__{which}_BTF").address for which in ("start", "stop"))
    prog.register_type_finder("btf", Btf(prog, prog.read(start, end - start)).find, enable_index=0)

    def variable(prog, name, flags, filename):
        if name != "init_task":
            return None
        return drgn.Object(prog, "struct task_struct", address=prog.symbol(name).address)

    prog.register_object_finder("kernel", variable, enable_index=0)


def tasks(prog: drgn.Program) -> set[str]:
    """The names of all tasks."""
    from drgn.helpers.linux.list import list_for_each_entry

    head = prog["init_task"].tasks.address_of_()
    found = list_for_each_entry("struct task_struct", head, "tasks")
    return {task.comm.string_().decode() for task in found}
