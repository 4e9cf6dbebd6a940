//! Record and replay: all that comes to a machine with one vCPU from outside, by count.
//!
//! The guest is a function of its start and of what it gets: a machine that records writes that
//! down, one that replays gets it from there and has no devices. Everything else is the same in
//! both, the translator's own life too: which blocks there are decides what the tables hold, and
//! those when accessed and dirty bits are set.
//!
//! - What an instruction asks for (a clock, a random number, a device's answer) is an *input*;
//!   inputs are in the order in which they were asked for.
//! - What comes by itself (memory that devices wrote, interrupt lines, timers) is applied while
//!   the guest stands between two instructions: a *stop*, at a count. Translated code that counts
//!   polls only where a replay can stand: before a block, and behind an indirect branch.
//!
//! - [`recorder`], [`player`]: the two sides
//! - [`gate`]: how devices get the guest to stand
//! - [`pages`]: the sum of memory at a checkpoint
//! - [`images`]: the checkpoints of a replay, to go back to
//! - [`crate::exec`]`::journalled`: the vCPU's part

mod gate;
pub mod images;
mod pages;
pub mod player;
pub mod recorder;

pub use pages::Pages;
pub use player::Player;
pub use recorder::Recorder;
use tetrarch_engine::EngineError;
use tetrarch_journal::JournalError;

/// Whether code counts its instructions, which is what a machine does that records or replays;
/// its time is the run loop's alone then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counting {
    Not,
    /// It stands where it polls, and where code leaves by itself.
    Recorded,
    /// The same, before any block: a recording also stands behind an indirect branch.
    Replayed,
    /// The same with all flags exact there, for a debugger. The code is not the recording's, so
    /// that a stop in a block is found by interpreting up to it.
    Sought,
}

/// Of a VM, if it records or replays.
pub enum Journal {
    Record(Box<Recorder>),
    Replay(Box<Player>),
}

impl Journal {
    /// What the guest reads of the host.
    pub fn value(&self, read: impl FnOnce() -> u64) -> u64 {
        match self {
            Self::Record(recorder) => recorder.value(read),
            Self::Replay(player) => player.value(read),
        }
    }

    /// The guest's code runs, and what it reads is an input: between `enter` and `leave`.
    pub fn enter(&self) {
        match self {
            Self::Record(recorder) => recorder.enter(),
            Self::Replay(player) => player.enter(),
        }
    }

    pub fn leave(&self, count: u64) {
        match self {
            Self::Record(recorder) => recorder.leave(count),
            Self::Replay(player) => player.leave(count),
        }
    }
}

pub(crate) fn failed(error: JournalError) -> EngineError {
    EngineError::Refused(format!("the recording: {error}"))
}
