//! A program at the other end of a stream socket: passt, QEMU, a switch.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::plain::Plain;
use crate::stream::{Ended, Stream};
use crate::watch::Watch;
use crate::{
    Counters, Direction, DropReason, Frame, Interest, Layers, MAX_FRAME, MIN_FRAME, NetBackend,
    Offload, Offloads, Packet, Sent,
};
use std::os::fd::AsFd;

/// The longest frame that may be padded: the shortest of a wire, and a tag.
const PADDED: usize = 60 + 4;

/// What drivers pad for a wire is left out of packets of IP: passt takes it for a part of them.
fn without_padding(frame: &[u8]) -> &[u8] {
    let short = Some(frame).filter(|frame| frame.len() <= PADDED);
    let end = short.and_then(Layers::of).map_or(frame.len(), |layers| layers.end);
    frame.get(..end).unwrap_or(frame)
}

/// Takes whole frames alone. When the peer has gone the link is down.
pub struct StreamPeer {
    /// For messages: "passt".
    name: String,
    stream: Option<Stream>,
    watch: Watch,
    interest: Interest,
    /// What the watch was last set to.
    watched: (bool, bool),
    plain: Plain,
    counters: Arc<Counters>,
}

impl StreamPeer {
    pub fn new(name: &str, socket: OwnedFd, counters: Arc<Counters>) -> io::Result<Self> {
        let mut peer = Self::unconnected(name, counters)?;
        peer.connect(socket)?;
        Ok(peer)
    }

    pub(crate) fn unconnected(name: &str, counters: Arc<Counters>) -> io::Result<Self> {
        Ok(Self {
            name: name.into(),
            stream: None,
            watch: Watch::new()?,
            interest: Interest { receive: true, send: false },
            watched: (false, false),
            plain: Plain::default(),
            counters,
        })
    }

    pub(crate) fn connect(&mut self, socket: OwnedFd) -> io::Result<()> {
        self.stream = Some(Stream::new(socket)?);
        self.watched = (false, false);
        self.update();
        Ok(())
    }

    fn update(&mut self) {
        let Some(stream) = &self.stream else { return };
        let wanted = (self.interest.receive, stream.waiting() != 0);
        if wanted != self.watched {
            self.watch.set(stream, wanted.0, wanted.1);
            self.watched = wanted;
        }
    }

    fn end(&mut self, ended: &Ended) {
        log::warn!("{}: the link is down: {ended}", self.name);
        if let Some(stream) = self.stream.take() {
            self.watch.set(&stream, false, false);
        }
    }
}

impl NetBackend for StreamPeer {
    fn event(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        self.interest = interest;
        self.update();
    }

    fn work(&mut self) {
        self.flush();
    }

    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn accept(&mut self, _offloads: Offloads) {}

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if self.stream.as_ref().is_some_and(|stream| !stream.has_room()) {
            self.flush();
        }
        let Some(stream) = &mut self.stream else {
            self.counters.dropped(Direction::Sent, DropReason::NoPeer);
            return Sent::Taken;
        };
        if !stream.has_room() {
            return Sent::Busy;
        }
        let pushed = self.plain.each(packet, |frame| stream.push(without_padding(frame)));
        if pushed.is_err() {
            self.counters.dropped(Direction::Sent, DropReason::Malformed);
        }
        Sent::Taken
    }

    fn flush(&mut self) {
        if let Some(stream) = &mut self.stream
            && let Err(ended) = stream.flush()
        {
            self.end(&ended);
        }
        self.update();
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        while let Some(stream) = &mut self.stream {
            match stream.receive() {
                Ok(Some(bytes)) if (MIN_FRAME..=MAX_FRAME).contains(&bytes.len()) => {
                    frame.set(Offload::default(), bytes);
                    return true;
                }
                Ok(Some(_)) => self.counters.dropped(Direction::Received, DropReason::Malformed),
                Ok(None) => return false,
                Err(ended) => self.end(&ended),
            }
        }
        false
    }

    fn link(&self) -> bool {
        self.stream.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::testing::{numbered, tcp4};
    use crate::{Checksum, Family, Payload, Segments, verify};

    fn pair() -> (StreamPeer, UnixStream, Arc<Counters>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let counters = Arc::new(Counters::default());
        (StreamPeer::new("a test", ours.into(), Arc::clone(&counters)).unwrap(), theirs, counters)
    }

    fn is_ready(peer: &StreamPeer) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let event = peer.event();
        poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    #[test]
    fn offloads_are_completed_since_the_peer_takes_none() {
        let (mut peer, mut program, _) = pair();
        let offload = Offload {
            checksum: Checksum::Partial { start: 34, offset: 16 },
            segments: Some(Segments { family: Family::V4, size: 1000, ecn: false, header: 54 }),
        };
        let frame = tcp4(2500, 0x10);
        let packet = Packet { offload, payload: Payload::Bytes(&frame) };
        assert_eq!(peer.send(&packet), Sent::Taken);
        peer.flush();
        let mut lengths = Vec::new();
        for _ in 0..3 {
            let mut prefix = [0; 4];
            program.read_exact(&mut prefix).unwrap();
            let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
            program.read_exact(&mut frame).unwrap();
            assert!(verify(&frame));
            lengths.push(frame.len());
        }
        assert_eq!(lengths, [1054, 1054, 554]);
    }

    #[test]
    fn padding_is_no_part_of_a_packet() {
        let packet = tcp4(0, 0x10);
        let long = tcp4(100, 0x10);
        for (frame, sent) in [
            ([&packet[..], &[0; 6]].concat(), &packet[..]),
            ([&packet[..], &[0; 11]].concat(), &[&packet[..], &[0; 11]].concat()[..]),
            ([&long[..], &[0; 6]].concat(), &[&long[..], &[0; 6]].concat()),
            (numbered(1), &numbered(1)),
        ] {
            assert_eq!(without_padding(&frame), sent);
        }
    }

    #[test]
    fn peer_that_takes_nothing_is_busy_and_said_to_be_ready_when_it_does() {
        let (mut peer, mut program, counters) = pair();
        let mut count = 0_u32;
        while peer.send(&Packet::plain(&numbered(count))) == Sent::Taken {
            count += 1;
        }
        peer.watch(Interest { receive: false, send: true });
        assert!(!is_ready(&peer));
        let mut left = count as usize * 64;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            left -= program.read(&mut buffer).unwrap();
            if is_ready(&peer) {
                peer.work();
            }
        }
        assert_eq!(peer.send(&Packet::plain(&numbered(0))), Sent::Taken);
        assert!(counters.stats().iter().all(|(name, _)| !name.contains("dropped")));
    }

    #[test]
    fn link_is_down_when_the_peer_has_gone_and_frames_are_counted() {
        let (mut peer, mut program, counters) = pair();
        program.write_all(&[0, 0, 0, 3, 1, 2, 3]).unwrap();
        program.write_all(&60_u32.to_be_bytes()).unwrap();
        program.write_all(&numbered(7)).unwrap();
        drop(program);
        let mut frame = Frame::default();
        assert!(is_ready(&peer));
        assert!(peer.receive(&mut frame));
        assert_eq!(frame.bytes(), numbered(7));
        assert!(peer.link());
        assert!(!peer.receive(&mut frame));
        assert!(!peer.link());
        assert!(!is_ready(&peer), "an event that never ends");
        assert_eq!(peer.send(&Packet::plain(&numbered(0))), Sent::Taken);
        assert_eq!(counters.drops(Direction::Sent, DropReason::NoPeer), 1);
        assert_eq!(counters.drops(Direction::Received, DropReason::Malformed), 1);
    }

    #[test]
    fn peer_that_has_gone_is_no_event_to_who_has_no_room() {
        let (mut peer, program, _) = pair();
        peer.watch(Interest { receive: false, send: false });
        drop(program);
        assert!(!is_ready(&peer));
        peer.watch(Interest { receive: true, send: false });
        assert!(is_ready(&peer));
    }
}
