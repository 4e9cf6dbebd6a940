//! A warm reset: interrupt controllers, timers and vCPUs as they were made. RAM
//! and the machine's clock go on. And one vCPU alone, as it comes into a machine that runs.

use tetrarch_engine::{ChipsetState, EngineError, PitCounting, VcpuState, VmState};

use crate::{Machine, MachineError, VcpuSlot};

/// What a machine is reset to; to be taken before its guest has run.
pub struct ResetState {
    chipset: ChipsetState,
    /// By number, all of one moment: their TSCs agree.
    vcpus: Vec<VcpuState>,
}

impl Machine {
    pub fn reset_state(&self) -> Result<ResetState, MachineError> {
        let state = || -> Result<_, EngineError> {
            let chipset = self.engine.save()?.chipset;
            let vcpus = self.vcpus.iter().map(|slot| slot.with(|vcpu| vcpu.save()));
            Ok(ResetState { chipset, vcpus: vcpus.collect::<Result<_, _>>()? })
        };
        Ok(self.held(state)??)
    }

    /// Where it fails the machine is in between, and cannot run on.
    pub fn reset(&self, to: &ResetState) -> Result<(), MachineError> {
        let reset = || -> Result<_, EngineError> {
            let now = self.engine.save()?;
            let chipset = at(to.chipset, now.chipset.pit.clock);
            self.engine.load(&VmState { chipset, ..now })?;
            for (slot, state) in self.vcpus.iter().zip(&to.vcpus) {
                slot.with(|vcpu| vcpu.load(state))?;
            }
            // What the chips had latched of the wires is gone, and the wires are not.
            self.irq.drive_high();
            Ok(())
        };
        Ok(self.held(reset)??)
    }

    /// Makes one vCPU as new: it waits for a SIPI, and its TSC is the first one's.
    pub fn reset_vcpu(&self, slot: &VcpuSlot, to: &ResetState) -> Result<(), MachineError> {
        let reset = || -> Result<_, EngineError> {
            let (Some(first), Some(state)) = (self.vcpus.first(), to.vcpus.get(slot.id as usize))
            else {
                return Err(EngineError::Internal(format!("there is no vCPU {}", slot.id)));
            };
            let tsc = first.with(|vcpu| vcpu.save())?.tsc;
            slot.with(|vcpu| vcpu.load(&VcpuState { tsc, ..state.clone() }))
        };
        Ok(self.held(reset)??)
    }
}

/// The chips as they were, but at a clock of the 8254 that is `clock`.
fn at(mut chipset: ChipsetState, clock: u64) -> ChipsetState {
    chipset.pit.clock = clock;
    for channel in &mut chipset.pit.channels {
        if let PitCounting::Running { start } = &mut channel.counting {
            *start = clock;
        }
    }
    chipset
}
