//! Exceptions, and everything else that ends an instruction early.

use tetrarch_engine::Exit;

/// Exception vectors (Intel SDM 3A, table 6-1).
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// Page-fault error code bits (Intel SDM 3A, 4.7).
pub mod pf {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

/// An exception to deliver to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
    /// What goes to CR2 of a page fault, the causes of a #DB as DR6 has them.
    pub address: u64,
}

impl Fault {
    pub const fn new(vector: u8) -> Self {
        Self { vector, error: None, address: 0 }
    }

    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), address: 0 }
    }

    /// #DB for `causes`, in the layout of DR6.
    pub const fn debug(causes: u64) -> Self {
        Self { vector: vector::DB, error: None, address: causes }
    }

    pub const fn page(address: u64, error: u32) -> Self {
        Self { vector: vector::PF, error: Some(error), address }
    }
}

/// Why an instruction did not run to its end. Nothing of it has happened but
/// finished iterations of a REP prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Fault(Fault),
    /// The machine must answer first; the instruction then starts again and
    /// finds the answer in [`crate::cpu::Cpu::replay`].
    Exit(Exit),
    /// The instruction has to start again while no other vCPU runs.
    Alone,
    /// Triple fault.
    Shutdown,
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

pub type R<T> = Result<T, Stop>;

/// #UD.
pub fn ud<T>() -> R<T> {
    Err(Fault::new(vector::UD).into())
}

/// #GP(code).
pub fn gp<T>(code: u32) -> R<T> {
    Err(Fault::with_error(vector::GP, code).into())
}
