//! The run loop of one vCPU.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tetrarch_engine::{EngineError, Exit, Reply, Vcpu, host_tsc};

use crate::{Bus, DeviceError, PlatformHandlers, RunControl, RunEnd, Step, VcpuControl, dispatch};

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Stops the machine's other vCPUs on every way out, a panic included, except
/// where the end came to all of them at once.
struct StopOthers<'a> {
    control: &'a RunControl,
    own: &'a Arc<VcpuControl>,
    armed: bool,
}

impl Drop for StopOthers<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.control.stop_others(self.own);
        }
    }
}

/// Runs a vCPU until the guest ends, somebody asks for a stop, or something
/// fails; then the machine's other vCPUs are stopped too. While the machine is
/// held the thread waits in here, and the vCPU's lock is free.
///
/// `on_kick` is called at each kick, for what the thread itself must see to
/// (signals); its error ends the run as a device's does. All ends leave the
/// vCPU between two instructions, so that it can run again; an instruction
/// whose device failed has then read all ones.
pub fn run_vcpu(
    vcpu: &Mutex<Box<dyn Vcpu>>,
    bus: &Bus,
    platform: &dyn PlatformHandlers,
    control: &RunControl,
    own: &Arc<VcpuControl>,
    on_kick: &mut dyn FnMut() -> Result<(), DeviceError>,
) -> Result<RunEnd, RunError> {
    let counters = &own.counters;
    let mut others = StopOthers { control, own, armed: true };
    let mut vcpu = vcpu.lock();
    let _inside = control.enter(own);
    let mut last = host_tsc();
    let mut attend = true;
    loop {
        // Stop and hold kick, and a kick is seen between two instructions: one
        // that has been answered is finished by then.
        while std::mem::take(&mut attend) {
            if control.park(own, &mut vcpu) {
                MutexGuard::unlocked(&mut vcpu, &mut *on_kick)?;
                if own.take_stop() {
                    others.armed = false;
                    return Ok(RunEnd::Stopped);
                }
                attend = true;
            }
        }
        let exit = vcpu.run()?;
        counters.count(&exit);
        let exited = host_tsc();
        own.set_serving(Some(&exit));
        let step = dispatch(exit, &mut **vcpu, bus, platform);
        own.set_serving(None);
        let answered = host_tsc();
        counters.run_ticks.add(answered.saturating_sub(last));
        last = answered;
        match step {
            Ok(Step::Answer { reply, by }) => {
                counters.count_access(&exit, by, answered.saturating_sub(exited));
                vcpu.reply(reply);
            }
            Ok(Step::End(reason)) => return Ok(reason),
            Ok(Step::Attend) => {
                own.engine_counters.tell_if_wanted(|| vcpu.counters());
                on_kick()?;
                if own.take_stop() {
                    others.armed = false;
                    return Ok(RunEnd::Stopped);
                }
                attend = true;
            }
            Ok(Step::Debug(stop)) => {
                let reply = control.debug_stop(own, stop, &mut **vcpu);
                vcpu.reply(reply);
                attend = true;
            }
            Err(error) => {
                vcpu.reply(match exit {
                    Exit::PortIn { .. } | Exit::MmioRead { .. } => Reply::Value(u64::MAX),
                    _ => Reply::Done,
                });
                finish_instruction(&mut **vcpu);
                return Err(error.into());
            }
        }
    }
}

/// Lets the vCPU finish the instruction whose exit was answered. What else the
/// instruction asks for gets the answer of an empty bus.
fn finish_instruction(vcpu: &mut dyn Vcpu) {
    /// Accesses of one instruction: two operands of 64 bytes, byte by byte, or the
    /// items of a string instruction that engine kvm has in one page.
    const MOST: usize = 4096;
    vcpu.kicker().kick();
    for _ in 0..MOST {
        match vcpu.run() {
            Ok(Exit::PortIn { .. } | Exit::MmioRead { .. }) => vcpu.reply(Reply::Value(u64::MAX)),
            Ok(Exit::PortOut { .. } | Exit::MmioWrite { .. }) => vcpu.reply(Reply::Done),
            _ => return,
        }
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
