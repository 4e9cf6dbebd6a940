//! What the fuzz targets and their short deterministic run share.
//!
//! Everything goes through the public interface of the engine. A finding is a
//! panic, a crash, a hang, an internal error of the engine, or a difference
//! between its two tiers.

// Each user of these modules takes some of the targets.
#![allow(dead_code)]

mod code;
mod differential;
mod guest;
mod input;
mod irqchip;
mod machine;
mod smp;
mod state;
mod tables;
mod watchdog;

pub use differential::differential;
pub use input::{Input, Random};
pub use irqchip::irqchip;
pub use machine::{interpreter, platform, translator};
pub use smp::smp;
pub use state::{saved, state};

/// A fuzz target: never panics unless it found something.
pub type Target = fn(&[u8]);

/// All targets by the names of their corpora.
pub const TARGETS: [(&str, Target); 8] = [
    ("interpreter", interpreter),
    ("translator", translator),
    ("differential", |data| {
        differential(data);
    }),
    ("irqchip", irqchip),
    ("platform", platform),
    ("saved", saved),
    ("smp", smp),
    ("state", state),
];
