//! What is written down.

use serde::{Deserialize, Serialize};
pub use serde_bytes::ByteBuf as Bytes;
use tetrarch_engine::{GuestFault, Registers, Reply};

/// In the order in which the machine met them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    Start(Start),
    /// Memory at the start that is not zero: guest physical address and bytes.
    Memory(u64, Bytes),
    Input(Input),
    Stop(Stop),
    /// The recording was ended at this count.
    End(u64),
}

/// The machine before its first instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// A sum of what CPUID says: other CPUs compute other things.
    pub cpuid: u32,
    pub tsc_hz: u64,
    /// The regions of RAM: guest physical address and length.
    pub ram: Vec<(u64, u64)>,
    /// Its saved state, in the engine's form.
    pub vm: Bytes,
    pub vcpu: Bytes,
}

/// What an instruction got that only the host knows. Instructions ask for these one by one, so
/// that their order is enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// A clock, or a random number.
    Value(u64),
    /// The machine's answer to an exit.
    Answer(Answer),
    /// What else had come when that answer was there.
    Outside(Outside),
}

/// [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Value(u64),
    Registers(Box<Registers>),
    Fault { vector: u8, error: Option<u32>, address: u64 },
}

impl From<&Reply> for Answer {
    fn from(reply: &Reply) -> Self {
        match reply {
            Reply::Done => Self::Done,
            Reply::Value(value) => Self::Value(*value),
            Reply::Registers(registers) => Self::Registers(registers.clone()),
            &Reply::Fault(GuestFault { vector, error, address }) => {
                Self::Fault { vector, error, address }
            }
        }
    }
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Done => Self::Done,
            Answer::Value(value) => Self::Value(value),
            Answer::Registers(registers) => Self::Registers(registers),
            Answer::Fault { vector, error, address } => {
                Self::Fault(GuestFault { vector, error, address })
            }
        }
    }
}

/// What devices did to the guest while it stood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outside {
    /// Guest physical address, and what is there now.
    pub writes: Vec<(u64, Bytes)>,
    /// Ranges that read as zeroes, given back to the host or not: address and length.
    pub holes: Vec<(u64, u64)>,
    pub lines: Vec<Line>,
    /// Nanoseconds of the machine's clock, where there are lines.
    pub now_ns: u64,
}

impl Outside {
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.holes.is_empty() && self.lines.is_empty()
    }
}

/// A change of an interrupt line, or a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Line {
    Pin { gsi: u32, level: bool },
    Message { address: u64, data: u32 },
}

/// A moment between two instructions at which something came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub count: u64,
    pub outside: Outside,
    /// Timers were looked at, at this time of the machine's clock and of the guest's TSC.
    pub timers: Option<(u64, u64)>,
    pub checkpoint: Option<Checkpoint>,
}

/// What the machine is at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The saved states, in the engine's form.
    pub vm: Bytes,
    pub vcpu: Bytes,
    /// A sum of all pages of RAM.
    pub memory: u64,
    /// Pages that were written since the last one, by number from the lowest, and the CRC of
    /// each.
    pub pages: Vec<(u64, u32)>,
}
