//! Events and repeated accesses that lead out of RAM, or nowhere.

use std::sync::Arc;
use std::time::Duration;

use tetrarch_engine::{Exit, Reply, Segment, SegmentTable, Vcpu, Vm};
use tetrarch_engine_bt::{Config, create_vm};
use tetrarch_memory::{GuestMemory, GuestPhys};

const CODE: u64 = 0x1_0000;
const HANDLER: u64 = 0x2000;
/// Not RAM of a machine with 1 MiB.
const DEVICE: u64 = 0x20_0000;

struct Guest {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

/// Real mode at [`CODE`] with a stack at `stack`; every vector leads to a handler
/// that writes to port 0x99.
fn guest(code: &[u8], stack: u64, rflags: u64) -> Guest {
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    memory.write(GuestPhys(CODE), code).unwrap();
    memory.write(GuestPhys(HANDLER), &[0xE6, 0x99, 0xF4]).unwrap();
    for vector in 0..256 {
        memory.write(GuestPhys(vector * 4), &(HANDLER as u32).to_le_bytes()).unwrap();
    }
    let vm = create_vm(memory, Config { translate: false, ..Config::default() }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut system = vcpu.system_registers();
    system.cs = Segment { base: CODE, limit: 0xFFFF, attributes: 0x9B, selector: 0x1000 };
    system.ss = Segment { base: stack, limit: 0xFFFF, attributes: 0x93, selector: 0 };
    system.idt = SegmentTable { base: 0, limit: 0x3FF };
    vcpu.set_system_registers(&system).unwrap();
    let mut registers = vcpu.registers();
    registers.rip = 0;
    registers.rflags = rflags;
    registers.gpr[4] = 0x1000;
    vcpu.set_registers(&registers);
    Guest { vm, vcpu }
}

/// The exits up to a PortOut or the `limit`.
fn exits(vcpu: &mut dyn Vcpu, limit: usize) -> Vec<Exit> {
    let mut exits = Vec::new();
    while exits.len() < limit {
        let exit = vcpu.run().unwrap();
        vcpu.reply(Reply::Value(0));
        exits.push(exit);
        if matches!(exit, Exit::PortOut { .. } | Exit::Shutdown) {
            break;
        }
    }
    exits
}

#[test]
fn exception_frame_goes_to_a_device() {
    let mut guest = guest(&[0x0F, 0x0B], DEVICE, 2);
    let push = |offset: u64, data: u64| Exit::MmioWrite { address: DEVICE + offset, size: 2, data };
    let handler = Exit::PortOut { port: 0x99, size: 1, data: 0 };
    assert_eq!(
        exits(&mut *guest.vcpu, 8),
        [push(0xFFE, 2), push(0xFFC, 0x1000), push(0xFFA, 0), handler]
    );
}

#[test]
fn interrupt_frame_goes_to_a_device() {
    let mut guest = guest(&[0xEB, 0xFE], DEVICE, 0x202);
    guest.vm.msi(0xFEE0_0000, 0x40);
    kick_later(&*guest.vcpu);
    let push = |offset: u64, data: u64| Exit::MmioWrite { address: DEVICE + offset, size: 2, data };
    let handler = Exit::PortOut { port: 0x99, size: 1, data: 0 };
    assert_eq!(
        exits(&mut *guest.vcpu, 8),
        [push(0xFFE, 0x202), push(0xFFC, 0x1000), push(0xFFA, 0), handler]
    );
}

#[test]
fn undeliverable_interrupt_shuts_down() {
    // jmp $, with an IDT that has no vectors.
    let mut guest = guest(&[0xEB, 0xFE], 0x8000, 0x202);
    let mut system = guest.vcpu.system_registers();
    system.idt.limit = 0;
    guest.vcpu.set_system_registers(&system).unwrap();
    guest.vm.msi(0xFEE0_0000, 0x40);
    kick_later(&*guest.vcpu);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Shutdown);
}

/// Ends a guest that would otherwise run for ever.
fn kick_later(vcpu: &dyn Vcpu) {
    let kicker = vcpu.kicker();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(2));
        kicker.kick();
    });
}

/// REP with device accesses without end: each is an exit, and a kick between two
/// of them must be seen.
#[test]
fn kick_ends_a_repeated_device_access() {
    // addr32 rep outsb; addr32 rep stosb, both with ECX near 2^32.
    for code in [&[0x67, 0xF3, 0x6E][..], &[0x67, 0xF3, 0xAA]] {
        let mut guest = guest(code, 0x8000, 2);
        let mut system = guest.vcpu.system_registers();
        system.es = Segment { base: DEVICE, limit: u32::MAX, attributes: 0x8093, selector: 0 };
        guest.vcpu.set_system_registers(&system).unwrap();
        let mut registers = guest.vcpu.registers();
        registers.gpr[1] = 0xFFFF_FFF0;
        registers.gpr[2] = 0x99;
        guest.vcpu.set_registers(&registers);
        for _ in 0..3 {
            let exit = guest.vcpu.run().unwrap();
            assert!(matches!(exit, Exit::PortOut { .. } | Exit::MmioWrite { .. }), "{exit:x?}");
            guest.vcpu.reply(Reply::Done);
        }
        guest.vcpu.kicker().kick();
        let mut after = Vec::new();
        while after.len() < 4 && after.last() != Some(&Exit::Kicked) {
            after.push(guest.vcpu.run().unwrap());
            guest.vcpu.reply(Reply::Done);
        }
        assert_eq!(after.last(), Some(&Exit::Kicked), "{after:x?}");
    }
}
