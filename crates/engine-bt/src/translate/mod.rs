//! The translator: 64-bit and 32-bit guest code to 64-bit host code.
//!
//! [`classify`] decides what happens to each instruction, [`liveness`] which
//! flags matter, [`builder`] makes a block of host code from the two with the
//! patterns of [`emit`] (operands, branches, strings and system instructions in
//! files of their own; what is special about 32-bit code in [`code32`]), [`cache`] keeps blocks and links them, [`stubs`] leads
//! into and out of them.

pub mod block;
mod branches;
pub mod builder;
pub mod cache;
mod classify;
mod code32;
mod directory;
mod emit;
mod growing;
mod instructions;
mod job;
pub mod liveness;
mod operands;
pub mod sources;
mod strings;
pub mod stubs;
mod system;
pub mod translations;
