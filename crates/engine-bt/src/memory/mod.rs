//! Guest memory as a vCPU sees it: page walks, the TLB that translated code
//! looks into, and the map of what has been translated.

pub mod code_map;
pub mod dirty_log;
pub mod mmu;
pub mod rendezvous;
pub mod tlb;
