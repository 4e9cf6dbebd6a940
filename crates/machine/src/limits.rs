//! Whether the limits of this process leave a machine what it needs beside its
//! RAM. Where they do not, some allocation in the middle of a run would fail,
//! and Rust ends the process then.

use rustix::process::{Resource, getrlimit};
use tetrarch_engine::EngineError;

/// Address space of engine bt beside RAM: tables, code in two mappings, and the
/// stacks and heaps of its threads (measured: 680 MiB, most of it never touched).
const BT: u64 = 704 << 20;
/// The same of engine kvm, which has threads alone (measured: 130 MiB).
const KVM: u64 = 160 << 20;
/// Private data of either, stacks and heaps (measured: between 35 and 80 MiB).
const DATA: u64 = 80 << 20;

/// To be called when the RAM is mapped.
pub fn check(engine: &str) -> Result<(), EngineError> {
    // Where /proc is not there, nothing can be said.
    let Some(used) = Used::now() else { return Ok(()) };
    let space = if engine == "kvm" { KVM } else { BT };
    for (resource, what, option, used, needed) in [
        (Resource::As, "address space", "ulimit -v", used.space, space),
        (Resource::Data, "data", "ulimit -d", used.data, DATA),
    ] {
        let Some(limit) = getrlimit(resource).current else { continue };
        let left = limit.saturating_sub(used);
        if left < needed {
            let mib = |bytes: u64| bytes >> 20;
            return Err(EngineError::Unavailable(format!(
                "of this process's {} MiB of {what} {} are left beside guest memory, and engine \
                 {engine} needs {}",
                mib(limit),
                mib(left),
                mib(needed),
            ))
            .mended_by(format!("raise that with {option}, or ask for less memory")));
        }
    }
    Ok(())
}

/// Bytes in use.
struct Used {
    space: u64,
    data: u64,
}

impl Used {
    /// proc_pid_statm(5): the first field is all, the sixth data and stack, in
    /// pages.
    fn now() -> Option<Self> {
        let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
        let bytes = |field: &str| {
            let pages: u64 = field.parse().ok()?;
            Some(pages.saturating_mul(rustix::param::page_size() as u64))
        };
        let mut fields = statm.split_ascii_whitespace();
        let space = bytes(fields.next()?)?;
        let data = bytes(fields.nth(4)?)?;
        Some(Self { space, data })
    }
}
