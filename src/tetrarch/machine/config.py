"""What a machine is made of: the one place where its options are named.

``Machine(...)``, a configuration file (config_file.py) and the command line
(cli/options.py) follow from the fields of ``MachineConfig``: their names,
checks, defaults and descriptions. What is wrong is one line that names the
option, the cause and the mend.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypedDict, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tetrarch.block.spec import CdromSpec, DiskSpec, FloppySpec
from tetrarch.console.backend import ConsoleBackend
from tetrarch.console.spec import ConsoleSpec, PortSpec, no_console
from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.firmware.spec import FirmwareSpec
from tetrarch.gdb.spec import GdbSpec
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.cpus import VCPUS_MAX, CpusSpec
from tetrarch.net.spec import NetSpec, each_its_own
from tetrarch.platforms.named import PlatformName
from tetrarch.share.spec import ShareSpec, share_tags
from tetrarch.vnc.spec import DisplaySpec

__all__ = [
    "MEMORY_MAX",
    "MEMORY_MIN",
    "MIB",
    "VCPUS_MAX",
    "CdromOption",
    "CpuSpec",
    "CpusSpec",
    "DiskOption",
    "DisplayOption",
    "EngineName",
    "FilePath",
    "FilePaths",
    "FloppyOption",
    "GdbOption",
    "InputOption",
    "MachineConfig",
    "MachineOptions",
    "NetOption",
    "OnReset",
    "PortOption",
    "ScreenKind",
    "ShareOption",
    "Spelling",
    "ValueProblem",
    "VirtioTransport",
    "VsockModel",
    "check_options",
    "make_config",
    "option",
    "option_names",
    "parse_size",
    "plainly",
    "several",
    "size_text",
]

MIB = 1 << 20
PAGE_SIZE = 4096

DEFAULT_MEMORY = 512 * MIB
# The boot data below 1 MiB and the smallest of kernels; less cannot start.
MEMORY_MIN = 4 * MIB
# 46 bits of physical address is what Linux on x86 takes with 4-level paging
# (Documentation/x86/x86_64/mm.rst); no host of ours has as much.
MEMORY_MAX = 1 << 46

# More digits than any size has would be an error of int() in Python's own words.
_SIZE = re.compile(r"^([0-9]{1,24})\s*([KMGT]?)(?:i?B)?$", re.IGNORECASE)
_SEED = re.compile(r"^[0-9]{1,20}$")
_UNITS = {"K": 1 << 10, "": MIB, "M": MIB, "G": 1 << 30, "T": 1 << 40}

EngineName = Literal["auto", "bt", "kvm"]
VirtioTransport = Literal["pci", "mmio"]
OnReset = Literal["end", "restart"]
DiskOption: TypeAlias = str | os.PathLike[str] | DiskSpec
CdromOption: TypeAlias = str | os.PathLike[str] | CdromSpec
FloppyOption: TypeAlias = str | os.PathLike[str] | FloppySpec
NetOption: TypeAlias = str | NetSpec
PortOption: TypeAlias = str | ConsoleBackend | PortSpec
InputOption = Literal["keyboard", "mouse", "tablet", "ps2-keyboard", "ps2-mouse"]
ScreenKind = Literal["vga", "svga"]
VsockModel = Literal["virtio", "vmci"]
DisplayOption: TypeAlias = str | DisplaySpec
GdbOption: TypeAlias = int | str | os.PathLike[str] | GdbSpec
ShareOption: TypeAlias = str | os.PathLike[str] | ShareSpec


def parse_size(value: object) -> int:
    """Bytes in "512M", "2G", or a bare number, which counts MiB."""
    match = None if isinstance(value, bool) else _SIZE.match(str(value).strip())
    if match is None:
        raise ValueProblem(f"{value!r} is no size", mend="write 512M, 2G or a number of MiB")
    size = int(match[1]) * _UNITS[match[2].upper()]
    if size % PAGE_SIZE:
        raise ValueProblem(f"{value!r} is no multiple of 4 KiB", mend="round it up")
    if size < MEMORY_MIN:
        raise ValueProblem(
            f"{value!r} is too little for a machine", mend=f"give {MEMORY_MIN // MIB}M or more"
        )
    if size > MEMORY_MAX:
        raise ValueProblem(
            f"{value!r} is more than a machine can address", mend="give less than 64T"
        )
    return size


def size_text(size: int) -> str:
    """As parse_size reads it."""
    return f"{size // MIB}M" if size % MIB == 0 else f"{size >> 10}K"


def _text(value: object) -> object:
    if isinstance(value, str) and "\0" in value:
        raise ValueProblem("it holds a zero byte", mend="remove it")
    return value


def _seed(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not _SEED.match(str(value)) or int(str(value)) >= 1 << 64:
        raise ValueProblem(f"{value!r} is no seed", mend="give a number of up to 64 bits")
    return int(str(value))


def _path(value: object) -> object:
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise ValueProblem(f"{value!r} is no file name", mend="name a file")
    return value


def _console(value: object) -> ConsoleSpec | None:
    if value is None or isinstance(value, ConsoleSpec):
        return value
    spec = ConsoleSpec.parse(value) if isinstance(value, str) else None
    if spec is None:
        raise no_console(value)
    return spec


def several(value: object) -> tuple[object, ...]:
    """What an option that can be repeated was given: one value, or several."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


#: Far more of anything than a machine has room for; there are looks at each with each other.
_MANY = 256

Made = TypeVar("Made")


def _each(make: Callable[[Any], Made], value: object) -> tuple[Made, ...]:
    """What ``make`` makes of each; a problem says which it is about."""
    given = several(value)
    if len(given) > _MANY:
        raise ValueProblem(f"there are {len(given)} of them", mend=f"give {_MANY} at most")
    made = []
    for index, one in enumerate(given):
        try:
            made.append(make(one))
        except ValueProblem as problem:
            problem.item = index
            raise
    return tuple(made)


def _disks(value: object) -> tuple[DiskSpec, ...]:
    return _images(DiskSpec, value, "disk")


def _cdroms(value: object) -> tuple[CdromSpec, ...]:
    return _images(CdromSpec, value, "CD-ROM")


# Drives of a floppy disk controller.
_FLOPPIES_MAX = 2


def _floppies(value: object) -> tuple[FloppySpec, ...]:
    disks = _images(FloppySpec, value, "floppy disk")
    if len(disks) > _FLOPPIES_MAX:
        raise ValueProblem(
            f"{len(disks)} floppy disks, and a controller has {_FLOPPIES_MAX} drives",
            mend="leave some out",
        )
    return disks


ImageSpec = TypeVar("ImageSpec", DiskSpec, CdromSpec, FloppySpec)


def _images(kind: type[ImageSpec], value: object, what: str) -> tuple[ImageSpec, ...]:
    """One disk, or several."""
    return _each(lambda one: _image(kind, one, what), value)


def _image(kind: type[ImageSpec], value: object, what: str) -> ImageSpec:
    if isinstance(value, kind):
        kind.parse(str(value))  # its values are checked as those that are written down
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueProblem(f"{value!r} is no {what}", mend="write PATH[,OPTION=VALUE]...")
    # The name of a file may hold anything.
    return kind.parse(value) if isinstance(value, str) else kind(Path(value))


def _nets(value: object) -> tuple[NetSpec, ...]:
    """One network, or several; "none" is that there are none."""
    nets = several(value)
    if "none" not in nets:
        specs = _each(_net, nets)
        each_its_own(specs)
        return specs
    if len(nets) > 1:
        raise ValueProblem("none is given beside others", mend="give it alone")
    return ()


def _net(value: object) -> NetSpec:
    if isinstance(value, NetSpec):
        NetSpec.parse(str(value))
        return value
    if not isinstance(value, str):
        raise ValueProblem(
            f"{value!r} is no network",
            mend="write user, tap=NAME, socket=PATH or vhost-user=PATH[,OPTION=VALUE]...",
        )
    return NetSpec.parse(value)


def _ports(value: object) -> tuple[PortSpec, ...]:
    """One port of the virtio console, or several."""
    return _each(PortSpec.of, value)


def _shares(value: object) -> tuple[ShareSpec, ...]:
    """One directory, or several."""
    shares = _each(_share, value)
    share_tags(shares)
    return shares


def _share(value: object) -> ShareSpec:
    if isinstance(value, ShareSpec):
        ShareSpec.parse(str(value))
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueProblem(f"{value!r} is no share", mend="write DIR[:TAG][,readonly]")
    # The name of a directory may hold anything.
    return ShareSpec.parse(value) if isinstance(value, str) else ShareSpec(Path(value))


def _inputs(value: object) -> tuple[object, ...]:
    """One input device, or several."""
    inputs = _each(_input, value)
    for one in ("ps2-keyboard", "ps2-mouse"):
        if inputs.count(one) > 1:
            raise ValueProblem(f"{one} is given twice", mend="give it once: there is one place")
    return inputs


def _input(value: object) -> object:
    if value not in get_args(InputOption):
        raise ValueProblem(
            f"{value!r} is no input device", mend=f"there are {', '.join(get_args(InputOption))}"
        )
    return value


def _variables(value: object) -> tuple[object, ...]:
    return _each(_variable, value)


def _variable(value: object) -> object:
    """KEY=VALUE, for the guest's guestinfo.KEY."""
    from tetrarch.platforms.vmware.guestinfo import GuestInfo

    name, equals, text = value.partition("=") if isinstance(value, str) else ("", "", "")
    if not equals:
        raise ValueProblem(f"{value!r} is no variable", mend="write KEY=VALUE")
    try:
        GuestInfo()[name] = text
    except ValueError as error:
        raise ValueProblem(str(error), mend="write KEY=VALUE") from None
    return value


def _gdb(value: object) -> GdbSpec | None:
    return None if value is None else GdbSpec.parse(value)


def _display(value: object) -> DisplaySpec | None:
    return None if value is None else DisplaySpec.parse(value)


def _firmware(value: object) -> FirmwareSpec | None:
    return None if value is None else FirmwareSpec.parse(value)


FilePath = Annotated[Path, BeforeValidator(_path)]
FilePaths = Annotated[tuple[Path, ...], BeforeValidator(lambda value: _each(_path, value))]
Text = Annotated[str, BeforeValidator(_text)]


def option(
    default: Any, description: str, metavar: str | None = None, *, name: str | None = None
) -> Any:
    """A field of a configuration.

    ``metavar`` stands for its value in the command line's help; ``name`` is for an option
    that cannot be called as the field is.
    """
    extra: dict[str, Any] = {"metavar": metavar}
    return Field(default=default, description=description, alias=name, json_schema_extra=extra)


Spelling: TypeAlias = Callable[[str, int | None], str]
"""How an error begins, about an option or about one of its several values: with what the user
wrote, and where. No name is several options together."""


def plainly(name: str, item: int | None = None) -> str:
    return f"{name}: " if name else ""


class MachineConfig(BaseModel):
    """One machine, as its user describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineName = option("auto", "What runs the guest's instructions.", "auto|bt|kvm")
    platform: PlatformName = option(
        "pc", "Whose machine the guest finds; docs/platforms.md [default: pc].", "pc|vmware|xen"
    )
    image: Text | None = option(
        None, "A cached guest to run, as image pull names it [default: debian].", "NAME"
    )
    kernel: FilePath | None = option(
        None, "bzImage, ELF vmlinux or Multiboot kernel [default: that of the image].", "FILE"
    )
    firmware: Annotated[FirmwareSpec | None, BeforeValidator(_firmware)] = option(
        None,
        "What starts before the guest; docs/firmware.md.",
        "seabios|ovmf|PATH[,variables=FILE]",
    )
    initrd: FilePath | None = option(
        None, "Initial RAM disk or modules for the kernel.", "FILE[ WORDS][,FILE]..."
    )
    append: Text | None = option(
        None, 'The whole kernel command line [default: "console=ttyS0 quiet"].', "TEXT"
    )
    append_extra: Text = option("", "Words added to the kernel command line.", "TEXT")
    memory: Annotated[int, BeforeValidator(parse_size)] = option(
        DEFAULT_MEMORY, "512M, 2G, or a number of MiB [default: 512M].", "SIZE"
    )
    cpus: Annotated[CpusSpec, BeforeValidator(CpusSpec.parse)] = option(
        CpusSpec(),
        "Virtual CPUs, how many there can be, and how they lie; docs/cpu.md [default: 1].",
        "N[,max=N][,sockets=N][,cores=N][,threads=N]",
    )
    cpu: Annotated[CpuSpec, BeforeValidator(CpuSpec.parse)] = option(
        CpuSpec(),
        "What it can: as much as the engine offers, no more than each engine of this host does, or"
        " what a model has, for machines that move between hosts; docs/cpu.md [default: host].",
        "host|portable|MODEL[,+FEATURE][,-FEATURE]...",
    )
    console: Annotated[ConsoleSpec | None, BeforeValidator(_console)] = option(
        None,
        "Where the guest's serial console goes. Ctrl-] leaves stdio.",
        "stdio|none|file=PATH|socket=PATH",
    )
    virtio_console: Annotated[tuple[PortSpec, ...], BeforeValidator(_ports)] = option(
        (),
        "A virtio console, hvc0 in the guest, or a port with a name. Can be repeated.",
        "CONSOLE[,name=NAME]",
    )
    disk: Annotated[tuple[DiskSpec, ...], BeforeValidator(_disks)] = option(
        (),
        "A disk; docs/disks.md has its options. Can be repeated.",
        "PATH[,OPTION=VALUE]...|vhost-user=SOCKET",
    )
    cdrom: Annotated[tuple[CdromSpec, ...], BeforeValidator(_cdroms)] = option(
        (), "A CD-ROM drive with a disc. Can be repeated.", "PATH[,bus=BUS]"
    )
    floppy: Annotated[tuple[FloppySpec, ...], BeforeValidator(_floppies)] = option(
        (), "A floppy drive with a disk. Can be given twice.", "PATH[,readonly]"
    )
    net: Annotated[tuple[NetSpec, ...], BeforeValidator(_nets)] = option(
        (),
        "A network card; docs/networks.md has its options. Can be repeated [default: none].",
        "none|user|tap=NAME|socket=PATH|vhost-user=PATH[,OPTION=VALUE]...",
    )
    share: Annotated[tuple[ShareSpec, ...], BeforeValidator(_shares)] = option(
        (),
        "A directory that the guest mounts by its tag; docs/shares.md. Can be repeated.",
        "DIR[:TAG][,readonly]",
    )
    input: Annotated[tuple[InputOption, ...], BeforeValidator(_inputs)] = option(
        (),
        "An input device, at virtio or as PS/2, which a program uses. Can be repeated.",
        "keyboard|mouse|tablet|ps2-keyboard|ps2-mouse",
    )
    guestinfo: Annotated[tuple[str, ...], BeforeValidator(_variables)] = option(
        (),
        "A variable that a guest on platform vmware finds; docs/vmware.md. Can be repeated.",
        "KEY=VALUE",
    )
    vsock: FilePath | None = option(
        None, "A Unix socket for connections with the guest's vsock ports.", "PATH"
    )
    vsock_model: VsockModel | None = option(
        None,
        "What has the guest's vsock ports [default: vmci on platform vmware, else virtio].",
        "virtio|vmci",
    )
    control: FilePath | None = option(
        None, "A Unix socket where QMP steers the machine; docs/control.md.", "PATH"
    )
    gdb: Annotated[GdbSpec | None, BeforeValidator(_gdb)] = option(
        None, "Where gdb can debug the guest; docs/gdb.md.", "PORT|PATH"
    )
    gdb_wait: bool = option(False, "Hold the guest before its first instruction, for gdb.")
    record: FilePath | None = option(
        None, "Write down all that comes to the guest, for replay; docs/replay.md.", "FILE"
    )
    replay: FilePath | None = option(None, "Let a recorded machine live again.", "FILE")
    on_reset: OnReset | None = option(
        None,
        "What a reset by the guest does [default: restart; with --debug-exit or --record: end].",
        "end|restart",
    )
    virtio: VirtioTransport = option(
        "pci", "How virtio devices are found by the guest [default: pci].", "pci|mmio"
    )
    rng: bool = option(True, "A virtio device with the host's random numbers.")
    balloon: bool = option(True, "A virtio device by which the guest gives memory back.")
    vga: bool = option(False, "A screen, for text; docs/screen.md.")
    screen: ScreenKind | None = option(
        None,
        "What draws the screen; docs/screen.md [default: svga on platform vmware, else vga].",
        "vga|svga",
    )
    display: Annotated[DisplaySpec | None, BeforeValidator(_display)] = option(
        None,
        "Where viewers find the screen, with a keyboard and a mouse; docs/screen.md.",
        "vnc=[HOST:]PORT|PATH[,password-file=FILE]",
    )
    hpet: bool = option(False, "Event timers beside the PIT; docs/devices.md.")
    chaos: Annotated[int | None, BeforeValidator(_seed)] = option(
        None, "Disturb the guest as the seed says, to find errors; docs/testing.md.", "SEED"
    )
    debug_exit: bool = option(False, "A value V written to port 0xf4 ends with (V << 1) | 1.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = option(
        "tetrarch", "A name for the machine, for reports [default: tetrarch].", "NAME"
    )

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self._check_together()
        return self

    def _check_together(self) -> None:
        self._one_kernel()
        self._one_on_stdio()
        self._wait_with_gdb()
        self._firmware_with_pci()
        self._firmware_with_kernel()
        self._chaos_on_bt()

    def _one_kernel(self) -> None:
        if self.image is not None and self.kernel is not None:
            raise ValueProblem("image and kernel both name a kernel", mend="give one of them")

    def _one_on_stdio(self) -> None:
        consoles = [self.console, *(port.console for port in self.virtio_console)]
        if consoles.count(ConsoleSpec("stdio")) > 1:
            raise ValueProblem(
                "two consoles cannot share stdio", mend="give one of them file=PATH or socket=PATH"
            )

    def _wait_with_gdb(self) -> None:
        if self.gdb_wait and self.gdb is None:
            raise ValueProblem("nothing is there that gdb_wait could wait for", mend="give gdb")

    def _firmware_with_pci(self) -> None:
        if self.firmware is not None and self.virtio == "mmio":
            raise ValueProblem(
                "firmware finds virtio devices on the PCI bus alone", mend="leave virtio at pci"
            )

    def _firmware_with_kernel(self) -> None:
        if self.firmware is None or self.kernel is not None or self.image is not None:
            return
        for name in ("initrd", "append"):
            if getattr(self, name) is not None:
                raise ValueProblem(
                    f"firmware has no kernel that {name} could be for",
                    mend="give kernel, or leave it out",
                )

    def _chaos_on_bt(self) -> None:
        if self.chaos is not None and self.engine == "kvm":
            raise ValueProblem("engine kvm has no chaos", mend="use engine bt")

    @property
    def restarts(self) -> bool:
        """Whether the machine starts again where its guest resets it.

        A test that ends by debug exit is not to run for ever instead, and no recording holds
        what comes after a reset.
        """
        if self.on_reset is not None:
            return self.on_reset == "restart"
        return not self.debug_exit and self.record is None and self.replay is None

    @property
    def drawn_by(self) -> ScreenKind | None:
        """What draws the screen; None where there is none."""
        if not self.vga and self.screen is None and self.display is None:
            return None
        if self.screen is not None:
            return self.screen
        # One that records has what can be recorded.
        return "svga" if self.platform == "vmware" and self.record is None else "vga"

    @property
    def vsock_at(self) -> VsockModel | None:
        """The device that has the guest's vsock ports; None where there are none."""
        if self.vsock is None:
            return None
        return self.vsock_model or ("vmci" if self.platform == "vmware" else "virtio")

    def with_seat(self) -> Self:
        """With what draws its screen, if it has one, and what its display needs for who sits
        there: a keyboard and a pointer."""
        if (screen := self.drawn_by) is None:
            return self
        changes: dict[str, Any] = {"vga": True, "screen": screen}
        if self.display is not None:
            seat: tuple[InputOption, ...] = self.input
            if not {"keyboard", "ps2-keyboard"} & set(seat):
                seat += ("ps2-keyboard",)
            if not {"mouse", "tablet", "ps2-mouse"} & set(seat):
                seat += ("ps2-mouse",)
            changes["input"] = seat
        return self.model_copy(update=changes)

    def updated(self, values: dict[str, Any], spelling: Spelling = plainly) -> Self:
        """With some options changed, as they are typed. Raises ConfigError."""
        checked = check_options(type(self), values, spelling)
        changes = {name: getattr(checked, name) for name in values}
        changed = self.model_copy(update=changes)
        try:
            changed._check_together()
        except ValueProblem as problem:
            raise ConfigError(problem.cause, mend=problem.mend) from None
        return changed


class MachineOptions(TypedDict, total=False):
    """The options as a type checker sees them in ``Machine(...)``; the checks are above.

    tests/machine/test_config.py holds the names to those of ``MachineConfig``.
    """

    engine: EngineName
    image: str | None
    kernel: str | os.PathLike[str] | None
    firmware: str | os.PathLike[str] | None
    initrd: str | os.PathLike[str] | None
    append: str | None
    append_extra: str
    cpu: str | CpuSpec
    memory: str | int
    cpus: int | str | CpusSpec
    virtio_console: PortOption | Sequence[PortOption]
    disk: DiskOption | Sequence[DiskOption]
    cdrom: CdromOption | Sequence[CdromOption]
    floppy: FloppyOption | Sequence[FloppyOption]
    net: NetOption | Sequence[NetOption]
    share: ShareOption | Sequence[ShareOption]
    input: InputOption | Sequence[InputOption]
    guestinfo: str | Sequence[str]
    vsock: str | os.PathLike[str] | None
    vsock_model: VsockModel | None
    control: str | os.PathLike[str] | None
    gdb: GdbOption | None
    gdb_wait: bool
    record: str | os.PathLike[str] | None
    replay: str | os.PathLike[str] | None
    on_reset: OnReset | None
    virtio: VirtioTransport
    rng: bool
    balloon: bool
    vga: bool
    screen: ScreenKind | None
    display: DisplayOption | None
    hpet: bool
    chaos: int | None
    debug_exit: bool
    name: str


# What pydantic's own checks say in its words, in ours: cause and mend.
_PROBLEMS = {
    "engine": ("is no engine", "there are auto, bt and kvm"),
    "platform": ("is no platform", "there are pc, vmware and xen"),
    "on_reset": ("is nothing that a reset can do", "there are end and restart"),
    "name": ("is no name", "use up to 64 letters, digits, '.', '_' and '-'"),
    "debug_exit": ("is neither true nor false", "give one of them"),
    "gdb_wait": ("is neither true nor false", "give one of them"),
    "vga": ("is neither true nor false", "give one of them"),
    "hpet": ("is neither true nor false", "give one of them"),
    "screen": ("draws no screen", "there are vga and svga"),
    "rng": ("is neither true nor false", "give one of them"),
    "balloon": ("is neither true nor false", "give one of them"),
    "virtio": ("is no transport of virtio", "there are pci and mmio"),
}

Model = TypeVar("Model", bound=BaseModel)


def make_config(values: dict[str, Any], spelling: Spelling = plainly) -> MachineConfig:
    """The checked configuration. Raises ConfigError for the first option that is wrong."""
    return check_options(MachineConfig, values, spelling)


def option_names(model: type[BaseModel]) -> list[str]:
    """What the options of a model are called where they are written down."""
    return [field.alias or name for name, field in model.model_fields.items()]


def check_options(
    model: type[Model], values: dict[str, Any], spelling: Spelling = plainly
) -> Model:
    """A model of options made of ``values``, with its errors in our words."""
    try:
        return model(**values)
    except ValidationError as error:
        raise _config_error(error, model, spelling) from None


def _config_error(
    error: ValidationError, model: type[BaseModel], spelling: Spelling
) -> ConfigError:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    problem = first.get("ctx", {}).get("error")
    if isinstance(problem, ValueProblem):
        return ConfigError(f"{spelling(name, problem.item)}{problem.cause}", mend=problem.mend)
    of = spelling(name, None)
    if first["type"] == "extra_forbidden":
        names = option_names(model)
        near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
        mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        return ConfigError(f"{of}there is no such option", mend=mend)
    if first["type"] == "path_type":
        return ConfigError(f"{of}{first['input']!r} is no path", mend="name a file, in quotes")
    if name in _PROBLEMS:
        cause, mend = _PROBLEMS[name]
        return ConfigError(f"{of}{first['input']!r} {cause}", mend=mend)
    return ConfigError(f"{of}{first['msg']}", mend=f"{first['input']!r} was given")
