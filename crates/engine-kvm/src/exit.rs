//! What KVM_RUN left in `kvm_run`, as a value.
//!
//! One exit of KVM may stand for many items: a string instruction's port
//! accesses come as one block. The machine gets them one at a time.

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_XEN, KVM_EXIT_XEN_HCALL,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use tetrarch_engine::Exit;

use crate::debug::DebugExit;

/// A block of port accesses, handed out one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortBlock {
    pub port: u16,
    pub size: u8,
    pub input: bool,
    pub count: u32,
    /// Where the items lie, from the start of `kvm_run`.
    pub offset: u64,
    /// Items handed out so far.
    pub done: u32,
}

/// An exit of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raw {
    Port(PortBlock),
    MmioRead {
        address: u64,
        size: u8,
    },
    MmioWrite {
        address: u64,
        size: u8,
        data: u64,
    },
    Halt,
    Shutdown,
    /// Nothing to tell the machine: go back in.
    Again,
    /// One of KVM's own hypercalls; the guest is to be told that we do not know it.
    Hypercall,
    /// A hypercall of the platform.
    PlatformCall {
        cpl: u8,
    },
    MsrRead {
        index: u32,
    },
    MsrWrite {
        index: u32,
        value: u64,
    },
    DirtyRingFull,
    Debug(DebugExit),
    Failed(Failure),
}

/// What went wrong inside KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// KVM met something that it cannot run or emulate.
    Internal { suberror: u32, data: [u64; 16], count: usize },
    /// The CPU refused to enter the guest.
    Entry { reason: u64, cpu: u32 },
    /// An exit that KVM does not know itself.
    Hardware(u64),
    /// A kind of exit that was never asked for.
    Unexpected(u32),
}

impl Failure {
    pub fn is_emulation(&self) -> bool {
        matches!(self, Self::Internal { suberror: KVM_INTERNAL_ERROR_EMULATION, .. })
    }

    /// What happened, and what helps. `place` says where the guest was, with
    /// the bytes of its instruction.
    pub fn explain(&self, place: &str) -> String {
        match self {
            Self::Internal { suberror, data, count } => {
                let what = match *suberror {
                    KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction",
                    KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came one inside the other",
                    KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
                    _ => "KVM left the guest for a reason of its own",
                };
                let details = data[..*count]
                    .iter()
                    .map(|word| format!("{word:#x}"))
                    .collect::<Vec<_>>()
                    .join(" ");
                let details =
                    if details.is_empty() { details } else { format!(", data {details}") };
                format!(
                    "{what} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}{details}) {place}; \
                     run the guest on engine bt"
                )
            }
            Self::Entry { reason, cpu } => format!(
                "the host CPU {cpu} refused to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware \
                 reason {reason:#x}) {place}; look into the host's kernel log, or run the guest \
                 on engine bt"
            ),
            Self::Hardware(reason) => format!(
                "KVM does not know why the guest was left (KVM_EXIT_UNKNOWN, hardware reason \
                 {reason:#x}) {place}; update the host's kernel, or use engine bt"
            ),
            Self::Unexpected(reason) => format!(
                "KVM left the guest with exit {reason}, which this version does not know, \
                 {place}; update the program, or use engine bt"
            ),
        }
    }
}

/// Reads what KVM_RUN reports after it returned 0.
pub fn decode(run: &kvm_run) -> Raw {
    let body = &run.__bindgen_anon_1;
    // SAFETY: the exit reason says which field of the union the kernel filled;
    // all are plain numbers, for which every bit pattern is valid.
    unsafe {
        match run.exit_reason {
            KVM_EXIT_IO => {
                let io = &body.io;
                Raw::Port(PortBlock {
                    port: io.port,
                    size: io.size,
                    input: u32::from(io.direction) == KVM_EXIT_IO_IN,
                    count: io.count,
                    offset: io.data_offset,
                    done: 0,
                })
            }
            KVM_EXIT_MMIO => {
                let mmio = &body.mmio;
                let (address, size) = (mmio.phys_addr, mmio.len.min(8) as u8);
                if mmio.is_write == 0 {
                    return Raw::MmioRead { address, size };
                }
                let mut bytes = [0; 8];
                bytes[..size as usize].copy_from_slice(&mmio.data[..size as usize]);
                Raw::MmioWrite { address, size, data: u64::from_le_bytes(bytes) }
            }
            KVM_EXIT_HLT => Raw::Halt,
            KVM_EXIT_SHUTDOWN => Raw::Shutdown,
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Raw::Again,
            KVM_EXIT_HYPERCALL => Raw::Hypercall,
            KVM_EXIT_XEN if body.xen.type_ == KVM_EXIT_XEN_HCALL => {
                Raw::PlatformCall { cpl: body.xen.u.hcall.cpl as u8 & 3 }
            }
            KVM_EXIT_X86_RDMSR => Raw::MsrRead { index: body.msr.index },
            KVM_EXIT_X86_WRMSR => Raw::MsrWrite { index: body.msr.index, value: body.msr.data },
            KVM_EXIT_DIRTY_RING_FULL => Raw::DirtyRingFull,
            KVM_EXIT_DEBUG => {
                let debug = &body.debug.arch;
                Raw::Debug(DebugExit { exception: debug.exception, pc: debug.pc, dr6: debug.dr6 })
            }
            KVM_EXIT_SYSTEM_EVENT => match body.system_event.type_ {
                KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => {
                    Raw::Shutdown
                }
                _ => Raw::Failed(Failure::Unexpected(KVM_EXIT_SYSTEM_EVENT)),
            },
            KVM_EXIT_INTERNAL_ERROR => {
                let internal = &body.internal;
                let count = (internal.ndata as usize).min(internal.data.len());
                let data = internal.data;
                Raw::Failed(Failure::Internal { suberror: internal.suberror, data, count })
            }
            KVM_EXIT_FAIL_ENTRY => Raw::Failed(Failure::Entry {
                reason: body.fail_entry.hardware_entry_failure_reason,
                cpu: body.fail_entry.cpu,
            }),
            KVM_EXIT_UNKNOWN => Raw::Failed(Failure::Hardware(body.hw.hardware_exit_reason)),
            reason => Raw::Failed(Failure::Unexpected(reason)),
        }
    }
}

impl PortBlock {
    /// The exit for the item that comes next; `data` holds an output's value.
    pub fn exit(&self, data: u32) -> Exit {
        let Self { port, size, .. } = *self;
        if self.input { Exit::PortIn { port, size } } else { Exit::PortOut { port, size, data } }
    }

    /// Where the item that comes next lies, from the start of `kvm_run`.
    pub fn place(&self) -> usize {
        self.offset as usize + self.done as usize * self.size as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(reason: u32) -> kvm_run {
        kvm_run { exit_reason: reason, ..Default::default() }
    }

    #[test]
    fn port_block_counts_its_items() {
        let mut run = run(KVM_EXIT_IO);
        run.__bindgen_anon_1.io.port = 0x80;
        run.__bindgen_anon_1.io.size = 2;
        run.__bindgen_anon_1.io.count = 3;
        run.__bindgen_anon_1.io.data_offset = 0x1000;
        let Raw::Port(mut block) = decode(&run) else { panic!("{:?}", decode(&run)) };
        assert_eq!(block.exit(0), Exit::PortIn { port: 0x80, size: 2 });
        block.done = 2;
        assert_eq!(block.place(), 0x1004);
        block.input = false;
        assert_eq!(block.exit(7), Exit::PortOut { port: 0x80, size: 2, data: 7 });
    }

    #[test]
    fn mmio_write_takes_only_its_bytes() {
        let mut run = run(KVM_EXIT_MMIO);
        run.__bindgen_anon_1.mmio.phys_addr = 0xD000_0000;
        run.__bindgen_anon_1.mmio.data = [0xFF; 8];
        run.__bindgen_anon_1.mmio.len = 2;
        run.__bindgen_anon_1.mmio.is_write = 1;
        let write = Raw::MmioWrite { address: 0xD000_0000, size: 2, data: 0xFFFF };
        assert_eq!(decode(&run), write);
    }

    #[test]
    fn internal_error_is_explained_with_cause_and_mend() {
        let mut run = run(KVM_EXIT_INTERNAL_ERROR);
        run.__bindgen_anon_1.internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
        run.__bindgen_anon_1.internal.ndata = 99;
        let Raw::Failed(failure) = decode(&run) else { panic!() };
        assert!(failure.is_emulation());
        let line = failure.explain("at rip 0x1000 <0f 0b>");
        assert!(line.contains("cannot emulate") && line.contains("<0f 0b>"), "{line}");
        assert!(line.contains("engine bt") && !line.contains('\n'), "{line}");
    }

    #[test]
    fn refused_entry_is_explained_with_cause_and_mend() {
        let mut run = run(KVM_EXIT_FAIL_ENTRY);
        run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason = 0x8000_0021;
        run.__bindgen_anon_1.fail_entry.cpu = 3;
        let Raw::Failed(failure) = decode(&run) else { panic!() };
        let line = failure.explain("at rip 0x1000");
        assert!(line.contains("CPU 3") && line.contains("0x80000021"), "{line}");
        assert!(line.contains("engine bt"), "{line}");
    }

    #[test]
    fn unknown_exits_are_failures() {
        assert_eq!(decode(&run(250)), Raw::Failed(Failure::Unexpected(250)));
        assert!(matches!(decode(&run(KVM_EXIT_UNKNOWN)), Raw::Failed(Failure::Hardware(_))));
    }
}
