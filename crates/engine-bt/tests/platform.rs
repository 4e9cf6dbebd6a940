//! What a platform adds, as a guest of the interpreter and of the translator
//! meets it.

mod support;

use support::case::{CODE, Fault};
use support::guest::{BASE, CODE_AT, End, Guest, KERNEL_CODE, P, U, W};
use tetrarch_engine::{
    CpuidLeaf, Exit, GuestFault, Hypercalls, Platform, RegisterPorts, Registers, Reply, Trap, Traps,
};
use tetrarch_memory::GuestPhys;

const VMCALL: [u8; 3] = [0x0F, 0x01, 0xC1];
const VMMCALL: [u8; 3] = [0x0F, 0x01, 0xD9];
const RDMSR: [u8; 2] = [0x0F, 0x32];
const WRMSR: [u8; 2] = [0x0F, 0x30];
const SYSCALL: [u8; 2] = [0x0F, 0x05];
const HLT: u8 = 0xF4;
const MSR: u32 = 0x4B56_4DFF;
const BACKDOOR: u16 = 0x5658;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;
const RDI: usize = 7;

const UD: End = End::Fault(Fault { vector: 6, error: 0, cr2: 0 });
const GP: End = End::Fault(Fault { vector: 13, error: 0, cr2: 0 });

fn on_both(platform: Platform, body: impl Fn(&mut Guest, &str)) {
    for (translate, name) in [(false, "interpreter"), (true, "translator")] {
        let mut guest = Guest::on_platform(translate, platform.clone());
        guest.map(CODE, CODE_AT, P | W | U);
        body(&mut guest, name);
    }
}

/// Starts `code`, with a HLT behind it, at CPL 0 or 3. Returns where.
fn start(guest: &mut Guest, kernel: bool, code: &[u8], gpr: [u64; 16]) -> u64 {
    let (physical, linear) =
        if kernel { (KERNEL_CODE, BASE + KERNEL_CODE) } else { (CODE_AT, CODE) };
    guest.write(physical, &[code, &[HLT]].concat());
    guest.start(kernel, linear, gpr, 2);
    linear
}

fn gpr(values: &[(usize, u64)]) -> [u64; 16] {
    let mut gpr = [0x1111; 16];
    for &(index, value) in values {
        gpr[index] = value;
    }
    gpr
}

fn hypercalls(hypercalls: Hypercalls) -> Platform {
    Platform { hypercalls, ..Platform::default() }
}

#[test]
fn hypercalls_are_undefined_without_a_platform() {
    on_both(Platform::default(), |guest, name| {
        for code in [VMCALL, VMMCALL] {
            start(guest, true, &code, gpr(&[]));
            assert_eq!(guest.run(), UD, "{name}");
        }
    });
}

#[test]
fn hypercall_of_either_vendor_shows_registers_and_takes_a_value() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        for code in [VMCALL, VMMCALL] {
            let at = start(guest, true, &code, gpr(&[(RAX, 7), (RBX, 8)]));
            assert_eq!(guest.run_raw(), Exit::Hypercall { cpl: 0 }, "{name}");
            let registers = guest.vcpu.registers().expect("state");
            assert_eq!((registers.rip, registers.gpr), (at, gpr(&[(RAX, 7), (RBX, 8)])), "{name}");
            guest.vcpu.reply(Reply::Value((-1000_i64) as u64));
            assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
            let after = guest.vcpu.registers().expect("state");
            assert_eq!(after.rip, at + code.len() as u64 + 1, "{name}");
            assert_eq!(after.gpr, gpr(&[(RAX, (-1000_i64) as u64), (RBX, 8)]), "{name}");
        }
    });
}

#[test]
fn hypercall_from_user_mode_is_the_platforms_choice() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        start(guest, false, &VMCALL, gpr(&[]));
        assert_eq!(guest.run(), UD, "{name}");
    });
    on_both(hypercalls(Hypercalls::All), |guest, name| {
        start(guest, false, &VMMCALL, gpr(&[]));
        assert_eq!(guest.run_raw(), Exit::Hypercall { cpl: 3 }, "{name}");
        guest.vcpu.reply(Reply::Value(9));
        // HLT is privileged.
        assert_eq!(guest.run(), GP, "{name}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[RAX], 9, "{name}");
        assert_eq!(guest.frame.rip, CODE + 3, "{name}");
    });
}

#[test]
fn reply_sets_all_registers_and_leaves_the_instruction_behind() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        let at = start(guest, true, &VMCALL, gpr(&[]));
        guest.run_raw();
        let mut registers = guest.vcpu.registers().expect("state");
        registers.gpr[RCX] = 0xC0;
        registers.rflags |= 1;
        guest.vcpu.reply(Reply::Registers(Box::new(registers)));
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        let after = guest.vcpu.registers().expect("state");
        assert_eq!((after.gpr, after.rflags & 1), (gpr(&[(RCX, 0xC0)]), 1), "{name}");
        assert_eq!(after.rip, at + 4, "{name}");
    });
}

#[test]
fn reply_that_moves_rip_is_obeyed() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        // vmcall ; ud2 ; hlt
        let at = start(guest, true, &[&VMCALL[..], &[0x0F, 0x0B]].concat(), gpr(&[]));
        guest.run_raw();
        let registers = Registers { rip: at + 5, ..guest.vcpu.registers().expect("state") };
        guest.vcpu.reply(Reply::Registers(Box::new(registers)));
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        assert_eq!(guest.vcpu.registers().expect("state").rip, at + 6, "{name}");
    });
}

#[test]
fn reply_can_be_a_fault_of_the_instruction() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        for (fault, end) in [(GuestFault::UD, UD), (GuestFault::GP, GP)] {
            let at = start(guest, true, &VMCALL, gpr(&[]));
            guest.run_raw();
            guest.vcpu.reply(Reply::Fault(fault));
            assert_eq!((guest.run(), guest.frame.rip), (end, at), "{name}");
        }
    });
}

#[test]
fn msrs_of_the_platform_are_read_and_written_by_the_machine() {
    let platform = Platform { msrs: vec![MSR..=MSR, 0x10..=0x10], ..Platform::default() };
    on_both(platform, |guest, name| {
        let state = gpr(&[(RCX, u64::from(MSR)), (RAX, 0x9_8765_4321), (RDX, 0x8_0000_0007)]);
        start(guest, true, &RDMSR, state);
        assert_eq!(guest.run_raw(), Exit::MsrRead { index: MSR }, "{name}");
        guest.vcpu.reply(Reply::Value(0x1234_5678_9ABC_DEF0));
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        let after = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((after[RAX], after[RDX]), (0x9ABC_DEF0, 0x1234_5678), "{name}");

        start(guest, true, &WRMSR, state);
        let exit = Exit::MsrWrite { index: MSR, value: 0x7_8765_4321 };
        assert_eq!(guest.run_raw(), exit, "{name}");
        guest.vcpu.reply(Reply::Done);
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr, state, "{name}");

        start(guest, true, &WRMSR, state);
        guest.run_raw();
        guest.vcpu.reply(Reply::Fault(GuestFault::GP));
        assert_eq!(guest.run(), GP, "{name}");

        // One that the CPU has too.
        start(guest, true, &RDMSR, gpr(&[(RCX, 0x10)]));
        assert_eq!(guest.run_raw(), Exit::MsrRead { index: 0x10 }, "{name}");
        guest.vcpu.reply(Reply::Value(0));

        // One that nobody has, and a user's.
        start(guest, true, &RDMSR, gpr(&[(RCX, u64::from(MSR) + 1)]));
        assert_eq!(guest.run(), GP, "{name}");
        start(guest, false, &RDMSR, state);
        assert_eq!(guest.run(), GP, "{name}");
    });
}

fn backdoor(any_privilege: bool) -> Platform {
    let ports = vec![RegisterPorts { ports: BACKDOOR..=BACKDOOR + 1, any_privilege }];
    Platform { ports, ..Platform::default() }
}

#[test]
fn port_shows_registers_to_user_mode_past_iopl() {
    on_both(backdoor(true), |guest, name| {
        // in eax, dx
        let state = gpr(&[(RAX, 0x564D_5868), (RCX, 10), (RDX, BACKDOOR.into())]);
        start(guest, false, &[0xED], state);
        let exit = Exit::PortWithRegisters { port: BACKDOOR, size: 4, input: true, string: false };
        assert_eq!(guest.run_raw(), exit, "{name}");
        let mut registers = guest.vcpu.registers().expect("state");
        assert_eq!(registers.gpr, state, "{name}");
        registers.gpr[RAX] = 6;
        registers.gpr[RBX] = 0x564D_5868;
        guest.vcpu.reply(Reply::Registers(Box::new(registers)));
        assert_eq!(guest.run(), GP, "{name}: HLT in user mode");
        assert_eq!(guest.frame.rip, CODE + 1, "{name}");
        let after = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((after[RAX], after[RBX]), (6, 0x564D_5868), "{name}");
    });
}

#[test]
fn port_of_the_platform_still_has_its_privilege_check_unless_told() {
    on_both(backdoor(false), |guest, name| {
        let state = gpr(&[(RDX, BACKDOOR.into())]);
        let at = start(guest, false, &[0xED], state);
        assert_eq!((guest.run(), guest.frame.rip), (GP, at), "{name}");
        start(guest, true, &[0xEF], state);
        let exit = Exit::PortWithRegisters { port: BACKDOOR, size: 4, input: false, string: false };
        assert_eq!(guest.run_raw(), exit, "{name}");
        guest.vcpu.reply(Reply::Done);
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr, state, "{name}");
    });
}

#[test]
fn value_in_reply_to_a_narrow_input_leaves_the_rest_of_rax() {
    on_both(backdoor(false), |guest, name| {
        // in al, dx
        start(guest, true, &[0xEC], gpr(&[(RAX, 0x1_2345_6789), (RDX, BACKDOOR.into())]));
        guest.run_raw();
        guest.vcpu.reply(Reply::Value(0xABCD));
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
        assert_eq!(guest.vcpu.registers().expect("state").gpr[RAX], 0x1_2345_67CD, "{name}");
    });
}

#[test]
fn repeated_string_access_is_one_exit() {
    on_both(backdoor(true), |guest, name| {
        // rep outsb
        let state = gpr(&[(RCX, 100), (RSI, CODE), (RDX, u64::from(BACKDOOR) + 1)]);
        let at = start(guest, false, &[0xF3, 0x6E], state);
        let exit =
            Exit::PortWithRegisters { port: BACKDOOR + 1, size: 1, input: false, string: true };
        assert_eq!(guest.run_raw(), exit, "{name}");
        let mut registers = guest.vcpu.registers().expect("state");
        assert_eq!((registers.rip, registers.gpr), (at, state), "{name}");
        registers.gpr[RCX] = 0;
        registers.gpr[RSI] += 100;
        guest.vcpu.reply(Reply::Registers(Box::new(registers)));
        assert_eq!(guest.run(), GP, "{name}: HLT in user mode");
        assert_eq!(guest.frame.rip, at + 2, "{name}");
        let after = guest.vcpu.registers().expect("state").gpr;
        assert_eq!((after[RCX], after[RSI]), (0, CODE + 100), "{name}");
    });
}

#[test]
fn memory_of_a_string_access_is_reached_with_the_callers_rights() {
    // Kernel's alone, read-only, and nowhere.
    const DATA: u64 = CODE + 0x1000;
    on_both(backdoor(true), |guest, name| {
        for (page, rights) in [(0, P | W | U), (1, P | W), (2, P | U)] {
            guest.map(DATA + page * 0x1000, CODE_AT + 0x1000 + page * 0x1000, rights);
        }
        let fault = |page: u64, error| {
            let address = DATA + page * 0x1000 + 5;
            Err(GuestFault { vector: 14, error: Some(error), address })
        };
        // rep outsb
        for kernel in [false, true] {
            start(guest, kernel, &[0xF3, 0x6E], gpr(&[(RDX, u64::from(BACKDOOR))]));
            guest.run_raw();
            let mut access = |page: u64, write| guest.vcpu.access(DATA + page * 0x1000 + 5, write);
            let at = |page: u64| Ok(GuestPhys(CODE_AT + 0x1000 + page * 0x1000 + 5));
            assert_eq!(access(0, true), at(0), "{name}");
            if kernel {
                assert_eq!(access(1, true), at(1), "{name}");
                assert_eq!(access(9, false), fault(9, 0), "{name}");
            } else {
                assert_eq!(access(1, false), fault(1, 5), "{name}");
                assert_eq!(access(1, true), fault(1, 7), "{name}");
                assert_eq!(access(2, false), at(2), "{name}");
                assert_eq!(access(2, true), fault(2, 7), "{name}");
                assert_eq!(access(9, true), fault(9, 6), "{name}");
            }
            assert_eq!(guest.vcpu.access(1 << 63, false), Err(GuestFault::GP), "{name}");
            guest.vcpu.reply(Reply::Done);
        }
    });
}

#[test]
fn other_ports_are_the_buss() {
    on_both(backdoor(true), |guest, name| {
        start(guest, true, &[0xEC], gpr(&[(RDX, u64::from(BACKDOOR) + 2)]));
        assert_eq!(guest.run_raw(), Exit::PortIn { port: BACKDOOR + 2, size: 1 }, "{name}");
        guest.vcpu.reply(Reply::Value(0));
    });
}

#[test]
fn leaves_of_the_platform_replace_and_add() {
    let leaf = |leaf, subleaf, registers| CpuidLeaf { leaf, subleaf, vcpu: None, registers };
    let cpuid = vec![
        leaf(0x4000_0000, None, [0x4000_0010, 1, 2, 3]),
        leaf(0x4000_0003, Some(2), [4, 5, 6, 7]),
        leaf(0x8000_0002, None, [8, 9, 10, 11]),
    ];
    on_both(Platform { cpuid, ..Platform::default() }, |guest, name| {
        assert_eq!(guest.cpuid(0x4000_0000, 5), [0x4000_0010, 1, 2, 3], "{name}");
        assert_eq!(guest.cpuid(0x4000_0003, 2), [4, 5, 6, 7], "{name}");
        assert_eq!(guest.cpuid(0x4000_0003, 1), [0; 4], "{name}");
        assert_eq!(guest.cpuid(0x8000_0002, 0), [8, 9, 10, 11], "{name}");
    });
}

fn traps() -> Platform {
    let traps = Traps { exceptions: 1 << 13 | 1 << 14, syscall: true };
    Platform { traps, ..Platform::default() }
}

#[test]
fn deprivileged_guests_exceptions_are_the_machines() {
    on_both(traps(), |guest, name| {
        // cli ; mov al, [0] ; ud2
        let code = [0xFA, 0x8A, 0x04, 0x25, 0, 0, 0, 0, 0x0F, 0x0B];
        let at = start(guest, false, &code, gpr(&[]));
        assert_eq!(guest.run_raw(), Exit::Trap(Trap::Exception(GuestFault::GP)), "{name}");
        let registers = Registers { rip: at + 1, ..guest.vcpu.registers().expect("state") };
        guest.vcpu.reply(Reply::Registers(Box::new(registers)));
        let page_fault = GuestFault { vector: 14, error: Some(4), address: 0 };
        assert_eq!(guest.run_raw(), Exit::Trap(Trap::Exception(page_fault)), "{name}");
        // Nothing has changed: it happens again.
        guest.vcpu.reply(Reply::Done);
        assert_eq!(guest.run_raw(), Exit::Trap(Trap::Exception(page_fault)), "{name}");
        guest.vcpu.reply(Reply::Registers(Box::new(Registers { rip: at + 8, ..registers })));
        // Not asked for.
        assert_eq!((guest.run(), guest.frame.rip), (UD, at + 8), "{name}");
    });
}

#[test]
fn trapped_exception_can_be_delivered_after_all() {
    on_both(traps(), |guest, name| {
        let at = start(guest, false, &[0xFA], gpr(&[]));
        let Exit::Trap(Trap::Exception(fault)) = guest.run_raw() else { panic!("{name}") };
        guest.vcpu.reply(Reply::Fault(fault));
        assert_eq!((guest.run(), guest.frame.rip), (GP, at), "{name}");
    });
}

#[test]
fn exceptions_of_the_kernel_are_its_own() {
    on_both(traps(), |guest, name| {
        start(guest, true, &RDMSR, gpr(&[(RCX, u64::from(MSR))]));
        assert_eq!(guest.run(), GP, "{name}");
    });
}

#[test]
fn syscall_of_a_deprivileged_guest_is_the_machines() {
    on_both(traps(), |guest, name| {
        for kernel_entry in [false, true] {
            let at = start(guest, false, &SYSCALL, gpr(&[(RAX, 23)]));
            let syscall = Trap::Syscall { next: at + 2 };
            assert_eq!(guest.run_raw(), Exit::Trap(syscall), "{name}");
            assert_eq!(guest.vcpu.registers().expect("state").rip, at, "{name}");
            if kernel_entry {
                // Into the kernel of the guest, with other segments and page tables.
                let mut system = guest.vcpu.system_registers().expect("state");
                let entry = support::guest::system(true);
                (system.cs, system.ss, system.cr3) = (entry.cs, entry.ss, entry.cr3);
                guest.vcpu.set_system_registers(&system).unwrap();
                guest.write(KERNEL_CODE, &[HLT]);
                let rip = BASE + KERNEL_CODE;
                let registers = Registers { rip, ..guest.vcpu.registers().expect("state") };
                guest.vcpu.reply(Reply::Registers(Box::new(registers)));
                assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
                assert_eq!(guest.vcpu.registers().expect("state").rip, rip + 1, "{name}");
            } else {
                guest.vcpu.reply(Reply::Value(0x2323));
                // HLT behind it.
                let halt = Exit::Trap(Trap::Exception(GuestFault::GP));
                assert_eq!(guest.run_raw(), halt, "{name}");
                let after = guest.vcpu.registers().expect("state");
                assert_eq!((after.rip, after.gpr[RAX]), (at + 2, 0x2323), "{name}");
                guest.vcpu.reply(Reply::Done);
            }
        }
    });
}

#[test]
fn exit_that_is_not_answered_is_told() {
    on_both(hypercalls(Hypercalls::Kernel), |guest, name| {
        start(guest, true, &VMCALL, gpr(&[(RDI, 1)]));
        guest.run_raw();
        assert!(guest.vcpu.run().is_err(), "{name}");
        guest.vcpu.reply(Reply::Done);
        assert_eq!(guest.run_raw(), Exit::Halt, "{name}");
    });
}
