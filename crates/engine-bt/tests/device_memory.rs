//! Events and repeated accesses that lead out of RAM, or nowhere.

mod support;

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
    let mut system = vcpu.system_registers().expect("state");
    system.cs = Segment { base: CODE, limit: 0xFFFF, attributes: 0x9B, selector: 0x1000 };
    system.ss = Segment { base: stack, limit: 0xFFFF, attributes: 0x93, selector: 0 };
    system.idt = SegmentTable { base: 0, limit: 0x3FF };
    vcpu.set_system_registers(&system).unwrap();
    let mut registers = vcpu.registers().expect("state");
    registers.rip = 0;
    registers.rflags = rflags;
    registers.gpr[4] = 0x1000;
    vcpu.set_registers(&registers).expect("registers");
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
    let mut system = guest.vcpu.system_registers().expect("state");
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
        let mut system = guest.vcpu.system_registers().expect("state");
        system.es = Segment { base: DEVICE, limit: u32::MAX, attributes: 0x8093, selector: 0 };
        guest.vcpu.set_system_registers(&system).unwrap();
        let mut registers = guest.vcpu.registers().expect("state");
        registers.gpr[1] = 0xFFFF_FFF0;
        registers.gpr[2] = 0x99;
        guest.vcpu.set_registers(&registers).expect("registers");
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

/// Accesses whose answer ends the instruction at once, in the translator, and
/// which the interpreter runs again: both must come to the same.
mod answered {
    use std::cell::RefCell;

    use super::support::case::Fault;
    use super::support::guest::{BASE, End, FREE, Guest, P, RAM, U, W, on_both};
    use tetrarch_engine::{Exit, Reply};

    const CODE: u64 = 0x40_0000;
    const DEVICE: u64 = 0x80_0000;
    const VALUE: u64 = 0x8182_8384_8586_8788;
    /// Bytes past RAM, of which nothing is behind the address but the machine.
    const PHYSICAL: u64 = RAM;

    /// Runs `code` twice, so that what was learnt the first time is used, and
    /// returns its exits and registers of the second time.
    fn run(
        guest: &mut Guest,
        kernel: bool,
        code: &[u8],
        flags: u64,
    ) -> (Vec<Exit>, [u64; 16], u64) {
        guest.map(CODE, FREE, P | W | U);
        guest.map(DEVICE, PHYSICAL, P | W | U);
        let mut code = code.to_vec();
        code.extend_from_slice(&[0x0F, 0x0B]);
        guest.write(FREE, &code);
        let mut last = (Vec::new(), [0; 16], 0);
        for _ in 0..2 {
            let mut gpr = std::array::from_fn(|n| 0x1111_1111_1111_1111 * n as u64);
            (gpr[2], gpr[4], gpr[6]) = (0x1234, DEVICE + 0x800, DEVICE + 0x10);
            guest.start(kernel, CODE, gpr, flags);
            let mut exits = Vec::new();
            let end = loop {
                match guest.run() {
                    End::Exit(exit) => exits.push(exit),
                    end => break end,
                }
                assert!(exits.len() < 4, "{exits:x?}");
                guest.vcpu.reply(Reply::Value(VALUE));
            };
            assert_eq!(end, End::Fault(Fault { vector: 6, error: 0, cr2: 0 }));
            let mut gpr = guest.vcpu.registers().expect("state").gpr;
            gpr[4] = guest.frame.rsp;
            assert_eq!(guest.frame.rip, CODE + code.len() as u64 - 2);
            last = (exits, gpr, guest.frame.rflags & 0xFFFF);
        }
        last
    }

    fn read(offset: u64, size: u8) -> Exit {
        Exit::MmioRead { address: PHYSICAL + offset, size }
    }

    fn write(offset: u64, size: u8, data: u64) -> Exit {
        Exit::MmioWrite { address: PHYSICAL + offset, size, data }
    }

    #[test]
    fn loads_put_the_answer_where_it_belongs() {
        let old = |n: u64| 0x1111_1111_1111_1111 * n;
        let cases: [(&str, &[u8], u8, usize, u64); 11] = [
            ("mov al,[rsi]", &[0x8A, 0x06], 1, 0, 0x88),
            ("mov bx,[rsi]", &[0x66, 0x8B, 0x1E], 2, 3, old(3) & !0xFFFF | 0x8788),
            ("mov r14d,[rsi]", &[0x44, 0x8B, 0x36], 4, 14, 0x8586_8788),
            ("mov r9,[rsi]", &[0x4C, 0x8B, 0x0E], 8, 9, VALUE),
            ("mov ah,[rsi]", &[0x8A, 0x26], 1, 0, 0x8800),
            ("movzx ecx,byte [rsi]", &[0x0F, 0xB6, 0x0E], 1, 1, 0x88),
            ("movzx r13,word [rsi]", &[0x4C, 0x0F, 0xB7, 0x2E], 2, 13, 0x8788),
            (
                "movsx r8w,byte [rsi]",
                &[0x66, 0x44, 0x0F, 0xBE, 0x06],
                1,
                8,
                old(8) & !0xFFFF | 0xFF88,
            ),
            ("movsx edi,word [rsi]", &[0x0F, 0xBF, 0x3E], 2, 7, 0xFFFF_8788),
            ("movsxd rdi,[rsi]", &[0x48, 0x63, 0x3E], 4, 7, 0xFFFF_FFFF_8586_8788),
            ("mov r12,[rsi+r8*0+disp8]", &[0x4C, 0x8B, 0x66, 0x00], 8, 12, VALUE),
        ];
        on_both(|guest, engine| {
            for (name, code, size, register, value) in cases {
                // stc before, adc rbx,0 behind: the carry must live through the exit.
                let code = [&[0xF9], code, &[0x48, 0x83, 0xD5, 0x00]].concat();
                let (exits, gpr, _) = run(guest, true, &code, 0x2);
                assert_eq!(exits, [read(0x10, size)], "{engine}: {name}");
                assert_eq!(gpr[register], value, "{engine}: {name}");
                assert_eq!(gpr[5], old(5) + 1, "{engine}: {name}: the carry");
            }
        });
    }

    #[test]
    fn stores_hand_over_what_is_stored() {
        let cases: [(&str, &[u8], Exit); 8] = [
            ("mov [rsi],bl", &[0x88, 0x1E], write(0x10, 1, 0x33)),
            ("mov [rsi],r9w", &[0x66, 0x44, 0x89, 0x0E], write(0x10, 2, 0x9999)),
            ("mov [rsi],r15d", &[0x44, 0x89, 0x3E], write(0x10, 4, 0xFFFF_FFFF)),
            ("mov [rsi],rdx", &[0x48, 0x89, 0x16], write(0x10, 8, 0x1234)),
            ("mov [rsi],dh", &[0x88, 0x36], write(0x10, 1, 0x12)),
            ("mov byte [rsi],-2", &[0xC6, 0x06, 0xFE], write(0x10, 1, 0xFE)),
            ("mov qword [rsi],-2", &[0x48, 0xC7, 0x06, 0xFE, 0xFF, 0xFF, 0xFF], write(0x10, 8, !1)),
            ("mov [rsp],rbx", &[0x48, 0x89, 0x1C, 0x24], write(0x800, 8, 0x3333_3333_3333_3333)),
        ];
        on_both(|guest, engine| {
            for (name, code, expected) in cases {
                let (exits, ..) = run(guest, true, code, 0x2);
                assert_eq!(exits, [expected], "{engine}: {name}");
            }
        });
    }

    #[test]
    fn access_that_leaves_its_page_is_split_as_the_interpreter_splits_it() {
        let seen = RefCell::new(Vec::new());
        on_both(|guest, _| {
            guest.map(DEVICE + 0x1000, PHYSICAL + 0x1000, P | W | U);
            // mov eax,[rsi+0xFEE]: its last two bytes are on the next page.
            seen.borrow_mut().push(run(guest, true, &[0x8B, 0x86, 0xEE, 0x0F, 0, 0], 0x2));
        });
        let seen = seen.into_inner();
        assert_eq!(seen[0].0, [read(0xFFE, 2), read(0x1000, 2)]);
        assert_eq!(seen[0], seen[1]);
    }

    #[test]
    fn ports_of_every_width_reach_the_machine() {
        let (inp, out) = (
            |port, size| Exit::PortIn { port, size },
            |port, size, data| Exit::PortOut { port, size, data },
        );
        let keep = 0x1234_5678_9ABC_DEF0_u64;
        // mov rax, keep
        let set = [&[0x48, 0xB8][..], &keep.to_le_bytes()].concat();
        let cases: [(&[u8], Exit, u64); 8] = [
            (&[0xEC], inp(0x1234, 1), keep & !0xFF | 0x88),
            (&[0x66, 0xED], inp(0x1234, 2), keep & !0xFFFF | 0x8788),
            (&[0xED], inp(0x1234, 4), 0x8586_8788),
            (&[0xE5, 0x80], inp(0x80, 4), 0x8586_8788),
            (&[0xEE], out(0x1234, 1, 0xF0), keep),
            (&[0x66, 0xEF], out(0x1234, 2, 0xDEF0), keep),
            (&[0xEF], out(0x1234, 4, 0x9ABC_DEF0), keep),
            (&[0xE6, 0xFF], out(0xFF, 1, 0xF0), keep),
        ];
        on_both(|guest, engine| {
            for (code, exit, rax) in cases {
                let code = [&set[..], code].concat();
                // In the kernel, and in user mode with IOPL 3.
                for (kernel, flags) in [(true, 0x8D7), (false, 0x38D7)] {
                    let (exits, gpr, after) = run(guest, kernel, &code, flags);
                    assert_eq!(exits, [exit], "{engine}");
                    assert_eq!(gpr[0], rax, "{engine}: {exit:x?}");
                    assert_eq!(after, flags, "{engine}: {exit:x?}: the flags");
                }
            }
        });
    }

    #[test]
    fn port_without_the_right_faults_before_it_is_touched() {
        on_both(|guest, engine| {
            guest.map(CODE, FREE, P | W | U);
            guest.write(FREE, &[0xEE]);
            guest.start(false, CODE, [0; 16], 0x2);
            let end = guest.run();
            assert_eq!(end, End::Fault(Fault { vector: 13, error: 0, cr2: 0 }), "{engine}");
            assert_eq!(guest.frame.rip, CODE, "{engine}");
        });
    }

    #[test]
    fn unanswered_access_is_refused_and_then_made_once() {
        on_both(|guest, engine| {
            guest.map(CODE, FREE, P | W | U);
            guest.map(DEVICE, PHYSICAL, P | W | U);
            // mov [rsi], eax ; out dx, al ; ud2
            guest.write(FREE, &[0x89, 0x06, 0xEE, 0x0F, 0x0B]);
            let mut gpr = [0; 16];
            gpr[6] = DEVICE;
            guest.start(true, CODE, gpr, 0x2);
            for expected in [write(0, 4, 0), Exit::PortOut { port: 0, size: 1, data: 0 }] {
                assert_eq!(guest.run_raw(), expected, "{engine}");
                assert!(guest.vcpu.run().is_err(), "{engine}: {expected:x?}");
                guest.vcpu.reply(Reply::Done);
            }
            assert!(matches!(guest.run(), End::Fault(Fault { vector: 6, .. })), "{engine}");
        });
    }

    #[test]
    fn new_registers_forget_the_answer() {
        on_both(|guest, engine| {
            guest.map(CODE, FREE, P | W | U);
            guest.write(FREE, &[0xEC, 0x0F, 0x0B]); // in al, dx ; ud2
            guest.start(true, CODE, [0; 16], 0x2);
            assert_eq!(guest.run_raw(), Exit::PortIn { port: 0, size: 1 }, "{engine}");
            guest.vcpu.reply(Reply::Value(0x55));
            guest.start(true, CODE + 1, [7; 16], 0x2);
            guest.run();
            assert_eq!(guest.frame.rip, CODE + 1, "{engine}");
            assert_eq!(guest.vcpu.registers().expect("state").gpr[0], 7, "{engine}");
        });
    }

    /// A change of the page table that the guest announces reaches what was learnt
    /// of device pages.
    #[test]
    fn device_page_mapped_elsewhere_is_found_there() {
        on_both(|guest, engine| {
            guest.map(DEVICE, PHYSICAL, P | W | U);
            let entry = BASE + guest.slot(DEVICE, 0);
            guest.map(CODE, FREE, P | W | U);
            // mov eax,[rsi] ; mov [rdi],rbx ; invlpg [rsi] ; mov eax,[rsi] ; ud2
            let code = [0x8B, 0x06, 0x48, 0x89, 0x1F, 0x0F, 0x01, 0x3E, 0x8B, 0x06, 0x0F, 0x0B];
            guest.write(FREE, &code);
            let mut gpr = [0; 16];
            (gpr[6], gpr[7], gpr[3]) = (DEVICE, entry, (PHYSICAL + 0x5000) | P | W | U);
            guest.start(true, CODE, gpr, 0x2);
            for expected in [read(0, 4), read(0x5000, 4)] {
                assert_eq!(guest.run_raw(), expected, "{engine}");
                guest.vcpu.reply(Reply::Value(0));
            }
            guest.map(DEVICE, PHYSICAL, P | W | U);
        });
    }
}
