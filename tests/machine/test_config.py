"""What a configuration takes, and how it says no."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.errors import ConfigError
from tetrarch.machine.config import make_config, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2G", 2 << 30),
        ("512", 512 << 20),
        (512, 512 << 20),
        ("8192K", 8 << 20),
        ("512MiB", 512 << 20),
        (" 64 M ", 64 << 20),
    ],
)
def test_sizes_as_they_are_written(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "0", "1K", "4097K", "99999T", "12X", True, None, "٣M", b"64"]
)
def test_what_is_no_size_is_refused_with_a_mend(text: object) -> None:
    with pytest.raises(ValueError, match=r";"):
        parse_size(text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("memory", "lots", "memory: 'lots' is no size; write 512M"),
        ("cpus", 0, "cpus: 0 is no number of CPUs; give 1 or more"),
        ("cpus", "two", "cpus: 'two' is no number"),
        ("cpus", 256, "cpus: 256 CPUs are more than a machine can have; give 255 or less"),
        ("engine", "tcg", "engine: 'tcg' is no engine; there are auto, bt and kvm"),
        ("name", "a/b", "name: 'a/b' is no name"),
        ("kernel", "", "kernel: '' is no file name"),
        ("kernel", "a\0b", "kernel: "),
        ("append", "a\0b", "append: it holds a zero byte"),
        ("debug_exit", "perhaps", "debug_exit: 'perhaps' is neither"),
        ("dsik", "x", "dsik: there is no such option"),
    ],
)
def test_refusal_is_one_line_that_names_the_option(
    option: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config({option: value})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@given(st.text())
def test_any_text_as_memory_is_a_size_or_a_config_error(text: str) -> None:
    try:
        config = make_config({"memory": text})
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 1  # noqa: PT017
    else:
        assert config.memory % 4096 == 0
