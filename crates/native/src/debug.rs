//! What a debugger in Python says and hears.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use tetrarch_engine::{DebugStop, GuestDebug, HardwareBreakpoint, ReplayStop, Watched};

use crate::descriptor::own_descriptor;
use crate::error::Failure;

/// Signals the eventfd(2) behind a number of Python's.
pub fn alert(descriptor: i32) -> Result<Arc<dyn Fn() + Send + Sync>, Failure> {
    let event = File::from(own_descriptor(descriptor)?);
    // Fails only where the counter is full, and then it is signalled.
    Ok(Arc::new(move || drop((&event).write(&1_u64.to_ne_bytes()))))
}

/// As Python has it: vCPU, kind, and the linear address of an INT3 or the bits of the
/// hardware breakpoints.
pub fn told((vcpu, stop): (usize, DebugStop)) -> (usize, &'static str, u64) {
    match stop {
        DebugStop::Step => (vcpu, "step", 0),
        DebugStop::Software { linear } => (vcpu, "software", linear),
        DebugStop::Hardware { hits } => (vcpu, "hardware", hits.into()),
        DebugStop::Replay(ReplayStop::Breakpoint { linear }) => (vcpu, "breakpoint", linear),
        DebugStop::Replay(ReplayStop::Arrived) => (vcpu, "arrived", 0),
        DebugStop::Replay(ReplayStop::End) => (vcpu, "end", 0),
    }
}

pub fn guest_debug(
    step: bool,
    block_interrupts: bool,
    software: bool,
    wanted: &[(String, u64, u8)],
) -> Result<GuestDebug, Failure> {
    let mut debug = GuestDebug { step, block_interrupts, software, ..GuestDebug::default() };
    if wanted.len() > debug.hardware.len() {
        let (most, number) = (debug.hardware.len(), wanted.len());
        return Err(Failure::refused(format!("{number} hardware breakpoints: a CPU has {most}")));
    }
    for (place, breakpoint) in debug.hardware.iter_mut().zip(wanted) {
        *place = Some(hardware(breakpoint)?);
    }
    Ok(debug)
}

fn hardware((watched, address, length): &(String, u64, u8)) -> Result<HardwareBreakpoint, Failure> {
    let kind = match watched.as_str() {
        "execute" => Some(Watched::Execute),
        "write" => Some(Watched::Write),
        "access" => Some(Watched::Access),
        _ => None,
    };
    let made = kind.and_then(|kind| HardwareBreakpoint::new(kind, *address, *length));
    made.ok_or_else(|| {
        Failure::refused(format!(
            "no CPU has a breakpoint for '{watched}' of {length} bytes at {address:#x}"
        ))
    })
}
