"""Packets on the wire."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tetrarch.gdb.packets import PACKET_MAX, PacketReader, Signal, escape, frame, unescape

# Much of it looks like packets.
NOISE = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.binary(max_size=20).map(frame),
        st.sampled_from([b"$", b"#", b"}", b"+", b"-", b"\x03", b"#00", b"$m0,4#fd"]),
    )
).map(b"".join)


@given(st.binary())
def test_escaped_bytes_come_back(data: bytes) -> None:
    escaped = escape(data)
    assert unescape(escaped) == data
    assert not set(escaped) & set(b"$#*")


@given(NOISE, st.integers(1, 7))
def test_reader_finds_the_same_in_pieces_of_any_size(data: bytes, size: int) -> None:
    whole = list(PacketReader().feed(data))
    reader = PacketReader()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert [item for piece in pieces for item in reader.feed(piece)] == whole


@given(st.lists(st.binary(max_size=30).map(escape)))
def test_packets_are_found_between_acknowledgements(payloads: list[bytes]) -> None:
    data = b"".join(b"+" + frame(payload) for payload in payloads)
    assert list(PacketReader().feed(data)) == payloads


def test_packets_that_did_not_arrive_whole_are_told() -> None:
    reader = PacketReader()
    assert list(reader.feed(b"$g#00-\x03")) == [Signal.DAMAGED, Signal.AGAIN, Signal.INTERRUPT]
    assert list(reader.feed(b"$g#6")) == []
    assert list(reader.feed(b"7")) == [b"g"]
    assert list(reader.feed(b"$" + bytes(PACKET_MAX + 1))) == [Signal.DAMAGED]
    assert list(reader.feed(frame(b"g"))) == [b"g"]
