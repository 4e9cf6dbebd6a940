//! A network between machines: those that name the same socket are on it.
//!
//! Whoever finds nobody at the socket makes the switch there, in its own process, and
//! connects to it like all others. When the switch's machine ends, another of them makes
//! it anew. QEMU joins by "-netdev stream,addr.type=unix,addr.path=PATH".

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::stream_peer::StreamPeer;
use crate::switch::Switch;
use crate::watch::Watch;
use crate::{Counters, Frame, Interest, NetBackend, Offloads, Packet, Sent};

/// How often it is tried to connect again.
const RETRY: Duration = Duration::from_millis(50);

pub struct Joined {
    path: PathBuf,
    peer: StreamPeer,
    /// Where the switch is ours.
    switch: Option<Switch>,
    switched: Arc<Counters>,
    watch: Watch,
    timer: OwnedFd,
    /// The timer runs: there is no connection.
    retrying: bool,
}

impl Joined {
    /// `switched` counts what goes through the switch, where it is ours.
    pub fn new(path: &Path, counters: Arc<Counters>, switched: Arc<Counters>) -> io::Result<Self> {
        let watch = Watch::new()?;
        let peer = StreamPeer::unconnected(&path.display().to_string(), counters)?;
        watch.set(peer.event(), true, false);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        watch.set(&timer, true, false);
        let mut joined =
            Self { path: path.into(), peer, switch: None, switched, watch, timer, retrying: false };
        joined.join()?;
        Ok(joined)
    }

    fn join(&mut self) -> io::Result<()> {
        if !self.connect()? {
            // Dropped before another is made: its thread has ended then.
            self.switch = None;
            self.switch = Switch::open(&self.path, Arc::clone(&self.switched))?;
            if self.switch.is_some() {
                self.connect()?;
            }
        }
        self.check_link();
        Ok(())
    }

    /// False: nobody is there.
    fn connect(&mut self) -> io::Result<bool> {
        match UnixStream::connect(&self.path) {
            Ok(socket) => self.peer.connect(socket.into()).map(|()| true),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Lets the timer run while there is no connection.
    fn check_link(&mut self) {
        if self.retrying != self.peer.link() {
            return;
        }
        self.retrying = !self.retrying;
        let wait = if self.retrying { RETRY } else { Duration::ZERO };
        let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        let setting = Itimerspec { it_interval: wait, it_value: wait };
        // Of a timer and a time that are sound.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting);
    }
}

impl NetBackend for Joined {
    fn event(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        self.peer.watch(interest);
    }

    fn work(&mut self) {
        self.peer.work();
        self.check_link();
        if self.peer.link() {
            return;
        }
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        if let Err(error) = self.join() {
            log::debug!("{}: {error}", self.path.display());
        }
    }

    fn offloads(&self) -> Offloads {
        self.peer.offloads()
    }

    fn accept(&mut self, offloads: Offloads) {
        self.peer.accept(offloads);
    }

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let sent = self.peer.send(packet);
        self.check_link();
        sent
    }

    fn flush(&mut self) {
        self.peer.flush();
        self.check_link();
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let came = self.peer.receive(frame);
        self.check_link();
        came
    }

    fn link(&self) -> bool {
        self.peer.link()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Instant;

    use super::*;
    use crate::Direction;
    use crate::testing::{number_of, numbered};

    const LIMIT: Duration = Duration::from_secs(30);

    struct Machine(Joined, Arc<Counters>);

    impl Machine {
        fn at(path: &Path) -> Self {
            let switched = Arc::new(Counters::default());
            let joined = Joined::new(path, Arc::default(), Arc::clone(&switched)).unwrap();
            Self(joined, switched)
        }

        fn send(&mut self, frame: &[u8]) {
            assert_eq!(self.0.send(&Packet::plain(frame)), Sent::Taken);
            self.0.flush();
        }

        /// Waits as a front end does.
        fn wait(&mut self, mut until: impl FnMut(&mut Self) -> bool) {
            use rustix::event::{PollFd, PollFlags, poll};
            let end = Instant::now() + LIMIT;
            while !until(self) {
                assert!(Instant::now() < end, "nothing came");
                let event = self.0.event();
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&second)).unwrap();
                self.0.work();
            }
        }

        fn receive(&mut self) -> Vec<u8> {
            let mut frame = Frame::default();
            self.wait(|machine| machine.0.receive(&mut frame));
            frame.bytes().to_vec()
        }
    }

    /// A frame from one address to another.
    fn between(to: u8, from: u8, number: u32) -> Vec<u8> {
        let mut frame = numbered(number);
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, to]);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, from]);
        frame
    }

    #[test]
    fn frames_reach_all_until_an_address_is_known_and_then_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net");
        let mut machines = [Machine::at(&path), Machine::at(&path), Machine::at(&path)];
        machines[0].send(&between(2, 0, 1));
        assert_eq!(number_of(&machines[1].receive()), 1);
        assert_eq!(number_of(&machines[2].receive()), 1);
        machines[2].send(&between(0, 2, 2));
        assert_eq!(number_of(&machines[0].receive()), 2);
        machines[0].send(&between(2, 0, 3));
        assert_eq!(number_of(&machines[2].receive()), 3);
        // What comes next is the broadcast: the two between were not for it.
        machines[2].send(&numbered(4));
        assert_eq!(number_of(&machines[1].receive()), 4);
        let (forwarded, others) = (machines[0].1.stats(), machines[1].1.stats());
        assert!(forwarded.contains(&("sent".into(), 4)), "{forwarded:?}");
        assert!(others.contains(&("sent".into(), 0)), "{others:?}");
    }

    #[test]
    fn another_machine_makes_the_switch_when_the_first_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net");
        let first = Machine::at(&path);
        let (mut second, mut third) = (Machine::at(&path), Machine::at(&path));
        drop(first);
        let mut frame = Frame::default();
        let end = Instant::now() + LIMIT;
        let mut came = false;
        while !came {
            assert!(Instant::now() < end, "they found no way to each other");
            if second.0.link() && third.0.link() {
                // Each time round, also while it has no room for one more.
                second.0.send(&Packet::plain(&numbered(5)));
                second.0.flush();
            }
            for machine in [&mut second, &mut third] {
                machine.0.work();
                came |= machine.0.receive(&mut frame);
            }
        }
        assert_eq!(number_of(frame.bytes()), 5);
        assert!(second.0.switch.is_some() != third.0.switch.is_some());
        drop((second, third));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "files were left");
    }

    #[test]
    fn what_a_killed_switch_left_is_no_obstacle_and_a_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        std::fs::write(folder.path().join("net.lock"), "").unwrap();
        assert!(Machine::at(&path).0.link());
        std::fs::write(&path, "mine").unwrap();
        assert!(Joined::new(&path, Arc::default(), Arc::default()).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn hostile_member_harms_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net");
        let (mut one, mut two) = (Machine::at(&path), Machine::at(&path));
        // Takes nothing, and sends a length that is none.
        let deaf = UnixStream::connect(&path).unwrap();
        let mut liar = UnixStream::connect(&path).unwrap();
        liar.write_all(&[0, 0, 0, 3, 1, 2, 3, 0xFF, 0xFF, 0xFF, 0xFF]).unwrap();
        assert_eq!(liar.read(&mut [0; 64]).unwrap_or(0), 0, "it was not turned away");
        // Made-up senders fill the table of addresses, and the deaf one's queue.
        let mut number = 0;
        let full = |stats: Vec<(String, u64)>| {
            stats.iter().any(|(name, count)| name == "received_dropped_queue_full" && *count > 0)
        };
        let end = Instant::now() + LIMIT;
        while number < 10_000 || !full(one.1.stats()) {
            assert!(Instant::now() < end);
            let mut frame = numbered(number);
            frame[8..12].copy_from_slice(&number.to_be_bytes());
            frame.resize(1500, 0);
            one.send(&frame);
            assert_eq!(number_of(&two.receive()), number);
            number += 1;
        }
        assert_eq!(one.1.drops(Direction::Sent, crate::DropReason::Malformed), 1);
        drop(deaf);
    }
}
