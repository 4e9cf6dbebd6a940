//! What the engine keeps of guest memory: the TLB that translated code looks into,
//! the map of what has been translated, the log of written pages, and how all
//! vCPUs' tables are changed at once.

pub mod code_map;
pub mod dirty_log;
pub mod rendezvous;
pub mod tlb;
