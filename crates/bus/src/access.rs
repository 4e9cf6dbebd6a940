//! What a vCPU is having answered, in one word that other threads can read.

use std::fmt;

use tetrarch_engine::Exit;

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Port(u16),
    Memory(u64),
    /// To a handler of the guest interface.
    Platform,
}

const PORT: u64 = 1 << 62;
const MEMORY: u64 = 2 << 62;
const PLATFORM: u64 = 3 << 62;

impl Access {
    /// 0 for an exit that no device answers. Physical addresses have 52 bits
    /// at most (Intel SDM 3A, 4.1.4), which leaves two for the kind.
    #[inline]
    pub(crate) fn encode(exit: &Exit) -> u64 {
        match *exit {
            Exit::PortIn { port, .. } | Exit::PortOut { port, .. } => PORT | u64::from(port),
            Exit::MmioRead { address, .. } | Exit::MmioWrite { address, .. } => {
                MEMORY | address & (PORT - 1)
            }
            Exit::Hypercall { .. }
            | Exit::MsrRead { .. }
            | Exit::MsrWrite { .. }
            | Exit::PortWithRegisters { .. }
            | Exit::Trap(_) => PLATFORM,
            Exit::Halt | Exit::Shutdown | Exit::Kicked | Exit::Debug(_) => 0,
        }
    }

    pub(crate) fn decode(word: u64) -> Option<Self> {
        match word >> 62 {
            1 => Some(Self::Port(word as u16)),
            2 => Some(Self::Memory(word & (PORT - 1))),
            3 => Some(Self::Platform),
            _ => None,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "the device at port {port:#x}"),
            Self::Memory(address) => write!(f, "the device at address {address:#x}"),
            Self::Platform => write!(f, "a handler of the guest interface"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_survive_the_word() {
        let there = |exit: Exit| Access::decode(Access::encode(&exit));
        assert_eq!(there(Exit::PortIn { port: 0, size: 1 }), Some(Access::Port(0)));
        let write = Exit::MmioWrite { address: 0xFE00_0000, size: 4, data: 1 };
        assert_eq!(there(write), Some(Access::Memory(0xFE00_0000)));
        assert_eq!(there(Exit::Hypercall { cpl: 0 }), Some(Access::Platform));
        assert_eq!(there(Exit::Kicked), None);
    }
}
