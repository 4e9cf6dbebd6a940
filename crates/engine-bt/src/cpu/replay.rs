//! Answers of the machine to an instruction that is not finished.
//!
//! An instruction that reads a port or memory that is not RAM stops with an
//! exit. When the answer is there the instruction is run again from its start:
//! accesses that were answered are taken from this log, in order, and the first
//! new one stops it once more. An instruction so needs no suspended state.

use tetrarch_engine::{Exit, Reply};

use crate::state::fault::{R, Stop};

#[derive(Default)]
pub struct Replay {
    answers: Vec<u64>,
    next: usize,
    /// The answer to an exit of the platform, of which an instruction has one.
    platform: Option<Reply>,
}

impl Replay {
    /// Called at the start of each attempt to run an instruction.
    #[inline]
    pub fn rewind(&mut self) {
        self.next = 0;
    }

    /// Called when the instruction (or one iteration of REP) is finished.
    #[inline]
    pub fn clear(&mut self) {
        self.next = 0;
        self.answers.clear();
        self.platform = None;
    }

    /// The answer to the next access, if it is there.
    pub fn next(&mut self) -> Option<u64> {
        let &answer = self.answers.get(self.next)?;
        self.next += 1;
        Some(answer)
    }

    /// As `Cpu::ask`, for an exit whose answer may be registers or a fault.
    #[cold]
    pub fn ask_platform(&mut self, exit: Exit) -> R<Reply> {
        if let Some(reply) = self.platform.take() {
            return Ok(reply);
        }
        Err(Stop::Exit(exit))
    }

    /// Records the machine's answer to the exit that stopped the instruction.
    pub fn answer(&mut self, value: u64) {
        self.answers.push(value);
    }

    /// The same for an exit of the platform.
    pub fn answer_platform(&mut self, reply: Reply) {
        self.platform = Some(reply);
    }

    /// Whether an instruction waits for answers or has some of them.
    #[inline]
    pub fn in_progress(&self) -> bool {
        !self.answers.is_empty() || self.platform.is_some()
    }
}
