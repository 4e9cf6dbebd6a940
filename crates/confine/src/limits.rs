//! Limits of the process's resources (getrlimit(2)), none of which can be raised again.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Beside what is mapped already, guest memory among it: translations, and stacks and heaps of
/// threads for each connection; far more than a machine takes.
const SPACE: u64 = 8 << 30;
/// A connection of the guest's has one or two, a disk a few.
const FILES: u64 = 4096;

pub(crate) fn lower() -> io::Result<()> {
    if let Some(used) = address_space() {
        at_most(Resource::As, used.saturating_add(SPACE))?;
    }
    at_most(Resource::Nofile, FILES)?;
    // A dump would have the guest's memory.
    at_most(Resource::Core, 0)
}

fn at_most(resource: Resource, most: u64) -> io::Result<()> {
    let now = getrlimit(resource);
    let lower = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    setrlimit(resource, Rlimit { current: lower(now.current), maximum: lower(now.maximum) })?;
    Ok(())
}

/// Bytes that are mapped: proc_pid_statm(5), the first field, in pages.
fn address_space() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().next()?.parse().ok()?;
    Some(pages.saturating_mul(rustix::param::page_size() as u64))
}
