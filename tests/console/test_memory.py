"""The console for programs."""

import re
import threading
from typing import Any

import pytest

from tetrarch.console import ExpectTimeout, MemoryConsole


def test_expect_takes_a_string_as_it_stands() -> None:
    console = MemoryConsole()
    console.write(b"a.b [x] $ rest")
    assert console.expect("[x] $ ") == "a.b [x] $ "
    assert console.read() == "rest"


def test_expect_takes_a_compiled_expression() -> None:
    console = MemoryConsole()
    console.write(b"pid 17\r\n")
    assert console.expect(re.compile(r"pid \d+\r")) == "pid 17\r"


def test_expect_waits_for_what_comes_in_pieces() -> None:
    console = MemoryConsole()
    console.start(lambda data: None, lambda: None)
    console.write(b"lo")
    timer = threading.Timer(0.05, console.write, (b"gin:",))
    timer.start()
    assert console.expect("login:", timeout=10) == "login:"
    timer.join()


def test_expect_counts_bytes_and_characters_apart() -> None:
    console = MemoryConsole()
    console.write("grüß\xff€ ende|".encode() + b"\xff\xfe|after")
    assert console.expect("ende|").endswith("ende|")
    assert console.expect("|") == "\ufffd\ufffd|"
    assert console.read() == "after"


def test_timeout_shows_the_end_of_the_output() -> None:
    console = MemoryConsole()
    console.start(lambda data: None, lambda: None)
    console.write(b"Kernel panic")
    with pytest.raises(ExpectTimeout, match=r"without 'login:'.*Kernel panic"):
        console.expect("login:", timeout=0.01)


def test_send_before_the_start_is_kept() -> None:
    console = MemoryConsole()
    console.send("early ")
    typed: list[bytes] = []
    console.start(typed.append, lambda: None)
    console.send(b"late")
    assert b"".join(typed) == b"early late"


def test_endless_output_is_bounded() -> None:
    console = MemoryConsole()
    for _ in range(100):
        console.write(b"x" * (1 << 20))
    assert len(console.text) <= 4 << 20
    console.write(b"end")
    assert console.expect("end").endswith("end")


def test_timeout_shows_what_was_asked_for_as_it_was_written() -> None:
    console = MemoryConsole()
    console.close()
    with pytest.raises(ExpectTimeout, match=re.escape("without 'root@a:~# ' on")):
        console.expect("root@a:~# ")


@pytest.mark.parametrize("pattern", [b"login:", None, 7, re.compile(b"x")])
def test_what_is_no_pattern_is_refused_in_a_sentence(pattern: Any) -> None:
    with pytest.raises(TypeError, match=r"expect\(\) takes text or a regular expression"):
        MemoryConsole().expect(pattern)
