//! What the engine asks of the host's kernel: memory for code, signals, timers,
//! and the waking of a vCPU's thread.

pub mod code_memory;
pub mod signals;
pub mod timer;
pub mod wake;
