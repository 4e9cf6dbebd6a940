//! A switch between machines, at a Unix socket that they connect to.
//!
//! It runs on a thread of its own, beside the machine that has it: also while that is held.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tetrarch_confine::{ThreadKind, enter};

use rustc_hash::FxHashMap;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tetrarch_io::Event;

use crate::stream::Stream;
use crate::{Counters, Direction, DropReason, MIN_FRAME};

/// Machines at one switch.
const MAX_MEMBERS: usize = 256;
/// Addresses that are remembered: a guest can make up any number of them.
const MAX_ADDRESSES: usize = 4096;
/// Frames of a member before it is the turn of others.
const TURN: usize = 64;

const STOP: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

type Address = [u8; 6];

/// The switch at a path, until it is dropped.
pub struct Switch {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    _lock: Lock,
}

/// Whoever has it has the switch. The kernel releases it with the process.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// None while another has it.
    fn take(socket: &Path) -> io::Result<Option<Self>> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        loop {
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Whoever had it may have removed the file before it was locked here.
            let same = std::fs::metadata(&path)
                .is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()));
            if same {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before it is released with the file.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Switch {
    /// Makes the switch at a path where nobody answers. None: another is about to.
    pub fn open(path: &Path, counters: Arc<Counters>) -> io::Result<Option<Self>> {
        let Some(lock) = Lock::take(path)? else { return Ok(None) };
        // What a switch left that was killed.
        if let Ok(left) = std::fs::symlink_metadata(path) {
            if !left.file_type().is_socket() {
                return Err(io::Error::other("there is a file that is no socket"));
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(Event::new()?);
        let mut hub = Hub::new(listener, Arc::clone(&stop), counters)?;
        let thread = std::thread::Builder::new().name("net-switch".into()).spawn(move || {
            enter(ThreadKind::Worker);
            hub.run();
        })?;
        Ok(Some(Self { stop, thread: Some(thread), path: path.into(), _lock: lock }))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // While the lock is held: it is still ours.
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Hub {
    epoll: OwnedFd,
    listener: UnixListener,
    stop: Arc<Event>,
    members: FxHashMap<u64, Member>,
    next: u64,
    /// Behind which member an address was seen.
    addresses: FxHashMap<Address, u64>,
    counters: Arc<Counters>,
}

struct Member {
    stream: Stream,
    /// The thread is told when there is room.
    waits: bool,
}

impl Hub {
    fn new(listener: UnixListener, stop: Arc<Event>, counters: Arc<Counters>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*stop, EventData::new_u64(STOP), EventFlags::IN)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            listener,
            stop,
            members: FxHashMap::default(),
            next: 0,
            addresses: FxHashMap::default(),
            counters,
        })
    }

    fn run(&mut self) {
        let mut events = Vec::with_capacity(MAX_MEMBERS);
        loop {
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, room, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("the switch cannot wait: {error}");
                    return;
                }
            }
            if self.stop.take() {
                return;
            }
            // First: whoever connected before a frame was sent gets it.
            if events.iter().any(|event| event.data.u64() == LISTENER) {
                while self.join() {}
            }
            for event in &events {
                self.serve(event.data.u64());
            }
            self.flush();
        }
    }

    /// Takes up one who asks; whether there may be another.
    fn join(&mut self) -> bool {
        match self.listener.accept() {
            Ok((socket, _)) if self.members.len() < MAX_MEMBERS => {
                let Ok(stream) = Stream::new(socket.into()) else { return true };
                let id = self.next;
                self.next += 1;
                if epoll::add(&self.epoll, &stream, EventData::new_u64(id), EventFlags::IN).is_ok()
                {
                    self.members.insert(id, Member { stream, waits: false });
                }
                true
            }
            Ok(_) => {
                log::warn!("a machine was turned away: there are {MAX_MEMBERS} at the switch");
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(_) => {
                // The host has no descriptors left, say, and the one who asks stays there.
                std::thread::sleep(Duration::from_millis(10));
                false
            }
        }
    }

    /// Forwards what a member has sent.
    fn serve(&mut self, from: u64) {
        for _ in 0..TURN {
            // Out of the table while its frame is looked at: others are written to. There is none
            // of our own events.
            let Some(mut member) = self.members.remove(&from) else { return };
            let frame = match member.stream.receive() {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.members.insert(from, member);
                    return;
                }
                Err(_) => {
                    let _ = epoll::delete(&self.epoll, &member.stream);
                    self.addresses.retain(|_, behind| *behind != from);
                    return;
                }
            };
            self.forward(from, frame);
            self.members.insert(from, member);
        }
    }

    fn forward(&mut self, from: u64, frame: &[u8]) {
        let (Some(to), Some(source)) = (frame.first_chunk::<6>(), frame.get(6..12)) else {
            self.counters.dropped(Direction::Sent, DropReason::Malformed);
            return;
        };
        if frame.len() < MIN_FRAME {
            self.counters.dropped(Direction::Sent, DropReason::Malformed);
            return;
        }
        self.counters.frame(Direction::Sent, frame.len() as u64);
        if let Ok(source) = Address::try_from(source)
            && source[0] & 1 == 0
        {
            if self.addresses.len() >= MAX_ADDRESSES && !self.addresses.contains_key(&source) {
                self.addresses.clear();
            }
            self.addresses.insert(source, from);
        }
        let deliver = |member: &mut Member| {
            if member.stream.has_room() {
                member.stream.push(frame);
                self.counters.frame(Direction::Received, frame.len() as u64);
            } else {
                self.counters.dropped(Direction::Received, DropReason::QueueFull);
            }
        };
        match self.addresses.get(to) {
            Some(behind) if *behind == from => {}
            Some(behind) => {
                if let Some(member) = self.members.get_mut(behind) {
                    deliver(member);
                }
            }
            None => self.members.values_mut().for_each(deliver),
        }
    }

    fn flush(&mut self) {
        let epoll = &self.epoll;
        for (id, member) in &mut self.members {
            if member.stream.waiting() == 0 && !member.waits {
                continue;
            }
            // One that has gone is seen when it is read from.
            let _ = member.stream.flush();
            let waits = member.stream.waiting() != 0;
            if waits != member.waits {
                let mut flags = EventFlags::IN;
                flags.set(EventFlags::OUT, waits);
                let _ = epoll::modify(epoll, &member.stream, EventData::new_u64(*id), flags);
                member.waits = waits;
            }
        }
    }
}
