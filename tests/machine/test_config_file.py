"""A configuration's file: what it can say, what its errors point at, and that it says it again."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrarch.block.spec import DiskSpec
from tetrarch.cli.options import CommandOptions
from tetrarch.console import MemoryConsole
from tetrarch.console.spec import ConsoleSpec, PortSpec
from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.config import MachineConfig, check_options, make_config
from tetrarch.machine.config_file import ConfigFile, load_config, relative_to
from tetrarch.machine.config_lines import lines_of
from tetrarch.machine.config_tables import TABLES, as_text
from tetrarch.machine.config_text import lines_for, toml_text
from tetrarch.net.spec import NetSpec
from tetrarch.share.spec import ShareSpec


def write(folder: Path, text: str) -> Path:
    file = folder / "m.toml"
    file.write_text(text)
    return file


def test_paths_of_consoles_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'virtio_console = ["stdio", "file=log,name=x"]\n'))
    assert [str(port) for port in config.virtio_console] == [
        "stdio",
        f"file={tmp_path}/log,name=x",
    ]


def test_tables_say_what_texts_say(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        cdrom = { path = "/c.iso", bus = "ide" }
        [[disk]]
        path = "/a,b.img"
        readonly = true
        iops = 500
        [[disk]]
        vhost-user = "/run/disk"
        [[net]]
        user = true
        forward = ["2222:22", "8080:80"]
        [[net]]
        tap = "tap0"
        queues = 2
        [[share]]
        directory = "/srv/a:b"
        [[share]]
        directory = "/srv"
        tag = "data"
        readonly = true
        [[virtio_console]]
        console = "file=/log"
        name = "org.example"
        """,
    )
    assert load_config(file) == make_config(
        {
            "cdrom": "/c.iso,bus=ide",
            "disk": ["/a,,b.img,readonly,iops=500", "vhost-user=/run/disk"],
            "net": ["user,forward=2222:22,forward=8080:80", "tap=tap0,queues=2"],
            "share": [ShareSpec(Path("/srv/a:b")), "/srv:data,readonly"],
            "virtio_console": "file=/log,name=org.example",
        }
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\nmemroy = "1G"', "2: memroy: there is no such option; did you mean memory?"),
        ('append-extra = "x"', "1: append-extra: there is no such option; did you mean append_e"),
        ('name = "a"\ncpus = "two"', "2: cpus: 'two' is no number of CPUs"),
        ('disk = [\n "a", # ]\n "b,fromat=raw",\n]', "3: disk: 'fromat=raw' is no option of a"),
        ('[[net]]\nuser = true\n\n[[net]]\ntap = "t"\nmtus = 9', "4: net: 'mtus=9' is no option"),
        ('[[disk]]\npth = "x"', "1: disk: a table says nothing of what it is; did you mean path?"),
        ("[[net]]\nmtu = 1400", "1: net: a table says nothing of what it is; give user or tap"),
        ('[[net]]\ntap = "t"\nuser = true', "1: net: a table says tap and user of what it is"),
        ("[[net]]\nuser = false", "1: net: user is no switch"),
        ('[[disk]]\npath = ""', "1: disk: path is empty"),
        ('[[disk]]\npath = "x"\niops = 1.5', "1: disk: iops is 1.5; give text"),
        ('x = 1\n[run.y]\n[[virtio_console]]\nconsole="none"\nnmae="x"', "3: virtio_console: 'n"),
        ('append = """\na\nb"""\nkernel = "x"\nimage = "y"', ": image and kernel both"),
        ("name = 'a'\nname = 'b'", "m.toml is no TOML file: Cannot overwrite a value"),
        ("a = 1\nb = \n", "2: this is no TOML: Invalid value; correct it"),
        ("\ndisk = [" + "'x'," * 257 + "]", "2: disk: there are 257 of them; give 256 at most"),
        ("run = 3", "1: run: it is no table; write [run]"),
        ('[run]\njson = true\nname = "a"', "3: run.name: this is an option of the machine"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    said = str(raised.value)
    assert said.startswith(str(file))
    assert message in said
    assert "\n" not in said


def test_what_is_no_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    for data in (b'name = "\xff"', b"#" * (1 << 20) + b"\n", b"a = " + b"[" * 5000):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"is no TOML file|more than 1 MiB"):
            load_config(file)
    with pytest.raises(ConfigError, match="no file name"):
        load_config("a\0b")


def test_line_of_everything() -> None:
    text = '''
# [[disk]]
a . "b c" = [ [1, 2], # ]
  """x
y""", {k = ["]", 1]},
]
'l' = \'\'\'
[t]
\'\'\'
[t]
k = 1.5
[[t.u]]
v = 1979-05-27 07:32:00
[[t.u]]
[t.u.w]
z = { q = 1, r = [1] }
[x]
'''
    assert lines_of(text) == {
        ("a", "b c"): 3,
        ("a", "b c", 0): 3,
        ("a", "b c", 1): 4,
        ("a", "b c", 2): 5,
        ("l",): 7,
        ("t",): 10,
        ("t", "k"): 11,
        ("t", "u", 0): 12,
        ("t", "u", 0, "v"): 13,
        ("t", "u", 1): 14,
        ("t", "u", 1, "w"): 15,
        ("t", "u", 1, "w", "z"): 16,
        ("x",): 17,
    }


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
PATHS = WORDS.map(lambda text: Path("/", text.replace("/", "")))
DISKS = st.builds(
    DiskSpec,
    PATHS,
    format=st.sampled_from([None, "raw", "qcow2"]),
    bus=st.sampled_from(["virtio", "nvme", "pvscsi", "ide"]),
    readonly=st.booleans(),
    bps=st.none() | st.integers(1, 1 << 50),
)
NETS = st.builds(
    NetSpec,
    st.just("socket"),
    PATHS.map(str),
    mtu=st.none() | st.integers(68, 65535),
    pcap=st.none() | PATHS,
    delay=st.integers(0, 60_000_000).map(lambda count: count / 1e6),
    loss=st.floats(0, 1, allow_subnormal=False).filter(lambda part: part == 0 or part > 1e-9),
    rate=st.none() | st.integers(1, 10**18 - 1),
)
TABLES_OF_WORDS = st.dictionaries(
    st.sampled_from(["path", "user", "tap", "tag", "console", "name", "mtu", "x"]),
    WORDS | st.booleans() | st.integers() | st.lists(WORDS, max_size=2) | st.none(),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "kernel": PATHS,
            "append": WORDS,
            "append_extra": WORDS,
            "memory": st.integers(1024, 1 << 30).map(lambda pages: f"{pages * 4}K"),
            "cpus": st.integers(1, 255),
            "console": PATHS.map(lambda path: ConsoleSpec("file", path)),
            "virtio_console": st.lists(
                st.builds(PortSpec, st.just(ConsoleSpec("none")), st.sampled_from(["", "a.b"]))
            ),
            "disk": st.lists(DISKS, max_size=3),
            "net": st.lists(NETS, max_size=3),
            "input": st.lists(st.sampled_from(["keyboard", "mouse"])),
            "rng": st.booleans(),
            "vsock": PATHS,
        },
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "timeout": st.floats(1e-3, 1e6),
            "command": st.lists(WORDS, min_size=1),
            "ssh_key": st.lists(PATHS),
            "run": st.lists(WORDS),
            "json": st.booleans(),
        },
    ),
)
def test_what_is_written_is_read_again(
    tmp_path: Path, values: dict[str, Any], run: dict[str, Any]
) -> None:
    config = relative_to(make_config(values), Path("/"))
    command = check_options(CommandOptions, run)
    text = toml_text(lines_for(config, {}), lines_for(command, {}), "a remark")
    file = tmp_path / "m.toml"
    file.write_text(text, newline="")
    read = ConfigFile.read(file)
    assert read.config == config
    assert check_options(CommandOptions, read.run) == command
    assert ("memory",) in read.lines


@given(st.sampled_from(sorted(TABLES)), TABLES_OF_WORDS)
def test_any_table_is_a_text_or_a_problem(option: str, table: dict[str, Any]) -> None:
    with contextlib.suppress(ValueProblem):
        assert isinstance(as_text(option, table), str)


def test_what_only_python_can_say_is_refused() -> None:
    config = MachineConfig(virtio_console=(PortSpec(MemoryConsole()),))
    with pytest.raises(ConfigError, match="from Python alone"):
        list(lines_for(config, {}))
    undecodable = make_config({"kernel": "/\udcff"})
    with pytest.raises(ConfigError, match=r"kernel: .* is no text"):
        toml_text(lines_for(undecodable, {}), [], "")
