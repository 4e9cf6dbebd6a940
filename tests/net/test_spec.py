"""Networks as they are written down."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch import ConfigError
from tetrarch.errors import ValueProblem
from tetrarch.machine.config import make_config
from tetrarch.machine.config_file import load_config
from tetrarch.net import Forward, NetSpec
from tetrarch.net.mac import format_mac, parse_mac, random_mac, stable_mac


def test_what_is_written_is_what_is_meant() -> None:
    spec = NetSpec.parse("user,forward=2222:22,forward=0.0.0.0:80:8080,forward=[::1]:81:8081")
    assert spec.forward == (
        Forward("127.0.0.1", 2222, 22),
        Forward("0.0.0.0", 80, 8080),
        Forward("::1", 81, 8081),
    )
    spec = NetSpec.parse("tap=t0,bridge=br0,queues=4,mac=52:54:00:12:34:56,mtu=9000")
    assert (spec.kind, spec.target, spec.bridge, spec.queues) == ("tap", "t0", "br0", 4)
    assert (spec.mac, spec.mtu) == (bytes.fromhex("525400123456"), 9000)
    spec = NetSpec.parse("socket=/tmp/a,,b,pcap=f,,g.pcap,delay=20ms,loss=0.5%,rate=10Mbit")
    assert (spec.target, spec.pcap) == ("/tmp/a,b", Path("f,g.pcap"))
    assert (spec.delay, spec.loss, spec.rate) == (0.02, 0.005, 10_000_000)


@pytest.mark.parametrize(
    "text",
    [
        "user",
        "user,forward=127.0.0.1:2222:22,forward=[::1]:2223:23",
        "tap=t0,bridge=br0,queues=4,mac=52:54:00:12:34:56,mtu=9000",
        "socket=/tmp/a,,b,pcap=f,,g.pcap,delay=20000us,loss=0.5%,rate=10000000",
        "socket=x,loss=100%",
        "tap=t0,queues=4,model=vmxnet3,mac=52:54:00:12:34:56",
        "user,model=e1000",
        "vhost-user=/run/a,,b,mac=52:54:00:12:34:56,mtu=9000",
    ],
)
def test_spec_is_written_as_it_is_read(text: str) -> None:
    assert str(NetSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no network; there are none, user, tap=NAME, socket=PATH and"),
        ("usr", "'usr' is no network"),
        ("user=x", "'user=x' is no network"),
        ("tap", "tap names nothing; write tap=NAME"),
        ("socket=", "socket names nothing; write socket=PATH"),
        ("tap=a/b", "tap is 'a/b', which names no network device"),
        ("tap=a-name-of-16-char", "tap is 'a-name-of-16-char'"),
        ("socket=a\0b", "'socket=a\\x00b' is no network"),
        ("user,froward=1:2", "'froward=1:2' is no option of a network; did you mean forward?"),
        ("user,forward", "forward is nothing; write [HOST:]PORT:GUEST"),
        ("user,forward=22", "forward is '22'"),
        ("user,forward=0:22", "forward is '0:22'"),
        ("user,forward=22:65536", "forward is '22:65536'"),
        ("user,forward=here:22:22", "forward: 'here' is no IP address"),
        ("user,queues=2", "user has neither bridge= nor queues=; give them to tap=NAME"),
        ("tap=t0,forward=1:2", "a tap has no forward=; give it to user"),
        ("tap=t0,queues=0", "queues is '0'; give 1 to 16"),
        ("tap=t0,queues=17", "queues is '17'"),
        ("tap=t0,queues=2,loss=1%", "2 queues cannot be slowed down"),
        ("vhost-user", "vhost-user names nothing; write vhost-user=PATH"),
        ("vhost-user=x,pcap=f", "a card by vhost-user has neither pcap="),
        ("vhost-user=x,queues=2", "vhost-user has neither bridge= nor queues="),
        ("user,model=e1000e", "model is 'e1000e'; give virtio, vmxnet3 or e1000"),
        ("user,model", "model is nothing; give virtio, vmxnet3 or e1000"),
        ("tap=t0,model=e1000,queues=2", "an e1000 card has one queue, not 2; leave out queues="),
        ("user,model=vmxnet3,mtu=1400", "a vmxnet3 card tells its guest no MTU"),
        ("vhost-user=x,model=vmxnet3", "a card by vhost-user is virtio's; leave out model="),
        ("user,mac=1", "mac is '1'; write it as"),
        ("user,mac=01:00:00:00:00:00", "01:00:00:00:00:00 is no address of one card"),
        ("user,mac=00:00:00:00:00:00", "00:00:00:00:00:00 is no address of one card"),
        ("user,mac=02:00:00:00:00:01,mac=02:00:00:00:00:02", "mac is given twice"),
        ("user,mtu=67", "mtu is '67'"),
        ("user,pcap=", "pcap is ''; name a file"),
        ("user,delay=1", "delay is '1'; write 20ms"),
        ("user,delay=61s", "delay is '61s'"),
        ("user,loss=0.5", "loss is '0.5'; write 1%"),
        ("user,loss=101%", "loss is '101%'"),
        ("user,rate=0", "rate is '0'"),
        ("user,rate=fast", "rate is 'fast'; write bits a second"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config({"net": text})
    assert str(raised.value).startswith(f"net: {message}")
    assert ";" in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text(alphabet="usertap=NAME,forwad:0123456789[].%msKMG\0", max_size=60))
def test_any_text_is_a_network_or_a_problem(text: str) -> None:
    try:
        spec = NetSpec.parse(text)
    except ValueProblem as problem:
        assert problem.mend  # noqa: PT017
    else:
        assert NetSpec.parse(str(spec)) == spec


def test_cards_are_one_or_several_or_none() -> None:
    assert make_config({}).net == ()
    assert make_config({"net": "none"}).net == ()
    assert make_config({"net": ["user", "socket=x"]}).net == (
        NetSpec("user"),
        NetSpec("socket", "x"),
    )
    assert make_config({"net": NetSpec("user")}).net == (NetSpec("user"),)
    with pytest.raises(ConfigError, match="none is given beside others"):
        make_config({"net": ["user", "none"]})
    with pytest.raises(ConfigError, match="7 is no network"):
        make_config({"net": 7})


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text('net = ["socket=net,pcap=a.pcap", "tap=t0"]\n')
    config = load_config(file)
    assert list(map(str, config.net)) == [
        f"socket={tmp_path / 'net'},pcap={tmp_path / 'a.pcap'}",
        "tap=t0",
    ]


def test_addresses_are_stable_local_and_of_one_card() -> None:
    found = {stable_mac(name, index) for name in ("a", "b") for index in range(3)}
    assert len(found) == 6
    assert stable_mac("a", 0) == stable_mac("a", 0)
    assert random_mac() != random_mac()
    for mac in (*found, random_mac()):
        assert mac[0] & 3 == 2
        assert parse_mac(format_mac(mac)) == mac
