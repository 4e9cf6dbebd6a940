//! What the engine asks of the host: memory for code, memory back, signals, timers, and the
//! waking of a vCPU's thread.

pub mod code_memory;
pub mod heap;
pub mod signals;
pub mod timer;
pub mod wake;
