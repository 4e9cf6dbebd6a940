"""Machines as other monitors write them down, made into configurations of this one."""

from tetrarch.foreign.appliance import import_ova
from tetrarch.foreign.carried import Carried, NotCarried
from tetrarch.foreign.firecracker import import_firecracker
from tetrarch.foreign.libvirt import import_libvirt
from tetrarch.foreign.ova_write import export_ova
from tetrarch.foreign.qemu import import_qemu
from tetrarch.foreign.qemu_words import is_qemu, words_of_script
from tetrarch.foreign.vmx import import_vmx

__all__ = [
    "Carried",
    "NotCarried",
    "export_ova",
    "import_firecracker",
    "import_libvirt",
    "import_ova",
    "import_qemu",
    "import_vmx",
    "is_qemu",
    "words_of_script",
]
