//! One connection: a stream of the host and a queue pair of the guest.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use tetrarch_vsock::{Greeting, flush};

use super::packet::{Kind, Protocol};
use crate::layout::Handle;
use crate::pairs::{Corrupt, QueuePair};

/// What is moved at once.
const CHUNK: u64 = 64 << 10;
/// Bytes each way after which it is the turn of others on the thread.
const TURN: u64 = 512 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host's program has not said which port it wants.
    Greeting,
    /// The guest has not shown yet that it has sockets.
    Waiting,
    /// The guest was asked for a connection: by the newer form of request, or by the older.
    Asked(Protocol),
    /// The guest has asked, and was told a size for the rings.
    Told,
    /// The guest is to attach to a queue pair of ours.
    Offered,
    Open,
}

/// The connection cannot go on.
pub struct Broken;

impl From<Corrupt> for Broken {
    fn from(_: Corrupt) -> Self {
        Self
    }
}

impl From<std::io::Error> for Broken {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

/// What is to be told to the guest, in this order.
pub type Notices = Vec<(Kind, [u64; 2])>;

pub struct Connection {
    pub stream: UnixStream,
    /// Its number.
    pub id: u64,
    pub phase: Phase,
    /// How often it was looked at while it was beginning.
    pub calls: u32,
    pub greeting: Greeting,
    pub protocol: Protocol,
    /// Of each ring.
    pub size: u64,
    pub pair: Option<Handle>,
    /// There may be something to read from the program.
    pub readable: bool,
    /// The program has closed its end; the guest was told.
    told_end: bool,
    /// The guest takes no more, gives no more.
    pub deaf: bool,
    pub finished: bool,
    /// The program was told so.
    shut: bool,
    /// From the guest, not yet taken by the program.
    pub out: VecDeque<u8>,
    /// With `Protocol::Asked`: the guest waits for bytes, for room.
    pub waits_to_read: bool,
    pub waits_to_write: bool,
    /// We do, and the guest knows.
    pub told_reading: bool,
    pub told_writing: bool,
}

impl Connection {
    pub fn new(stream: UnixStream, id: u64, phase: Phase) -> Self {
        Self {
            stream,
            id,
            phase,
            calls: 0,
            greeting: Greeting::default(),
            protocol: Protocol::States,
            size: 0,
            pair: None,
            readable: true,
            told_end: false,
            deaf: false,
            finished: false,
            shut: false,
            out: VecDeque::new(),
            waits_to_read: false,
            waits_to_write: false,
            told_reading: false,
            told_writing: false,
        }
    }

    /// The guest has to say something for it to be open.
    pub fn is_beginning(&self) -> bool {
        !matches!(self.phase, Phase::Greeting | Phase::Open)
    }

    /// Moves what there is, both ways. Gives whether there may be more.
    pub fn exchange(
        &mut self,
        pair: &mut QueuePair,
        notices: &mut Notices,
    ) -> Result<bool, Broken> {
        let more_out = self.take_from_guest(pair, notices)?;
        let more_in = self.give_to_guest(pair, notices)?;
        Ok(more_out || more_in)
    }

    /// Both sides have said all. What the guest has not read yet it can read nevertheless.
    pub fn is_over(&self) -> bool {
        self.shut && (self.deaf || self.told_end)
    }

    fn take_from_guest(
        &mut self,
        pair: &mut QueuePair,
        notices: &mut Notices,
    ) -> Result<bool, Broken> {
        let (mut moved, mut was_full, mut more) = (0, false, false);
        loop {
            flush(&mut self.out, &self.stream)?;
            let ready = pair.incoming()?;
            if !self.out.is_empty() || ready == 0 {
                break;
            }
            if moved >= TURN {
                more = true;
                break;
            }
            let length = ready.min(CHUNK);
            was_full |= pair.take(length, &mut self.out)?;
            moved += length;
        }
        let waits = match self.protocol {
            Protocol::States => was_full,
            Protocol::Asked => self.waits_to_write && pair.incoming()? < self.size - 1,
        };
        if waits {
            self.waits_to_write = false;
            notices.push((Kind::Read, [0; 2]));
        }
        let empty = self.out.is_empty() && pair.incoming()? == 0;
        if empty && self.finished && !self.shut {
            self.shut = true;
            // A program that has gone already is no error here.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if empty && !self.finished && self.protocol == Protocol::Asked && !self.told_reading {
            self.told_reading = true;
            notices.push((Kind::WaitingRead, pair.awaited()));
        }
        Ok(more)
    }

    fn give_to_guest(
        &mut self,
        pair: &mut QueuePair,
        notices: &mut Notices,
    ) -> Result<bool, Broken> {
        let (mut moved, mut buffer) = (0, Vec::new());
        let mut more = false;
        while self.readable && !self.told_end && !self.deaf {
            let room = pair.room()?;
            if room == 0 {
                if self.protocol == Protocol::Asked && !self.told_writing {
                    self.told_writing = true;
                    notices.push((Kind::WaitingWrite, pair.wanted()));
                }
                break;
            }
            if moved >= TURN {
                more = true;
                break;
            }
            buffer.resize(room.min(CHUNK) as usize, 0);
            let length = match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.told_end = true;
                    notices.push((Kind::Shutdown, [super::NO_SEND, 0]));
                    break;
                }
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let was_empty = pair.put(&buffer[..length])?;
            moved += length as u64;
            let waits = match self.protocol {
                Protocol::States => was_empty,
                Protocol::Asked => std::mem::take(&mut self.waits_to_read),
            };
            if waits {
                notices.push((Kind::Wrote, [0; 2]));
            }
        }
        // It waits, and has not read what is there.
        if self.waits_to_read && pair.unread()? > 0 {
            self.waits_to_read = false;
            notices.push((Kind::Wrote, [0; 2]));
        }
        Ok(more)
    }

    /// The guest gives no more: what it has written before is the program's.
    pub fn leave(mut self, pair: &mut QueuePair) -> Leaving {
        if let Ok(ready) = pair.incoming() {
            let _ = pair.take(ready, &mut self.out);
        }
        Leaving { stream: self.stream, out: self.out }
    }
}

/// A stream whose guest has gone, until its program has taken the rest.
pub struct Leaving {
    pub stream: UnixStream,
    pub out: VecDeque<u8>,
}

impl Leaving {
    /// Whether there is nothing more to do.
    pub fn is_over(&mut self) -> bool {
        flush(&mut self.out, &self.stream).is_err() || self.out.is_empty()
    }
}
