//! What a debugger outside the guest can do with it.

use std::sync::LazyLock;

use tetrarch_engine::{
    DebugStop, Exit, GuestDebug, GuestFault, HardwareBreakpoint, Reply, Watched,
};
use tetrarch_memory::GuestPhys;

use super::Body;
use super::guest::{CODE, Engine, FRESH, Guest, STACK};

pub const BODIES: &[(&str, Body)] = &[
    ("step_ends_behind_each_instruction", step),
    ("step_over_an_access_ends_when_it_is_answered", step_over_an_access),
    ("planted_int3_stops_the_guest_before_it", software_breakpoint),
    ("int3_of_the_guest_s_own_reaches_its_handler", foreign_int3),
    ("hardware_breakpoint_stops_before_its_instruction", execute_breakpoint),
    ("watchpoints_stop_behind_the_access_that_they_are_for", watchpoints),
    ("guest_does_not_see_the_debugger_s_breakpoints", unseen),
    ("linear_addresses_are_translated", translate),
];

const STEP: GuestDebug =
    GuestDebug { step: true, block_interrupts: true, software: false, hardware: [None; 4] };
const SOFTWARE: GuestDebug =
    GuestDebug { step: false, block_interrupts: false, software: true, hardware: [None; 4] };
const OFF: GuestDebug =
    GuestDebug { step: false, block_interrupts: false, software: false, hardware: [None; 4] };

fn hardware(number: usize, watched: Watched, address: u64, length: u8) -> GuestDebug {
    let mut debug = OFF;
    debug.hardware[number] = HardwareBreakpoint::new(watched, address, length);
    assert!(debug.hardware[number].is_some());
    debug
}

/// QEMU's TCG, as of 7.2, gives a nested guest its INT3s whatever is intercepted, and does not
/// arm the breakpoints of its DR7.
fn has_breakpoints(engine: Engine) -> bool {
    let tcg = tetrarch_engine::cpuid::host_brand().contains("QEMU TCG");
    let has = engine != Engine::Kvm || !tcg;
    if !has {
        eprintln!("left out: below this KVM is QEMU's TCG, which has no breakpoints for it");
    }
    has
}

/// A KVM without hardware need not know of INT3 and of data breakpoints.
fn has_all_breakpoints(engine: Engine) -> bool {
    static HARDWARE: LazyLock<bool> =
        LazyLock::new(|| tetrarch_engine_kvm::probe(tetrarch_engine_kvm::DEVICE).hardware_backed());
    let has = engine != Engine::Kvm || *HARDWARE;
    if !has {
        eprintln!("left out: this KVM has no hardware behind it, and not all breakpoints");
    }
    has && has_breakpoints(engine)
}

impl Guest {
    fn debug(&mut self, debug: &GuestDebug) {
        self.vcpu.set_guest_debug(debug).expect("a debugger");
    }

    fn rip(&mut self) -> u64 {
        self.vcpu.registers().expect("state").rip
    }

    fn stops(&mut self, stop: DebugStop) {
        assert_eq!(self.run(), Exit::Debug(stop));
        assert!(self.vcpu.run().is_err(), "an unanswered stop");
        self.vcpu.reply(Reply::Done);
    }
}

fn step(engine: Engine) {
    // inc eax ; jmp +2 ; (2 bytes) ; push rax ; mov ecx, 3 ; loop . ; out 0x80, al
    let code = [0xFF, 0xC0, 0xEB, 2, 0, 0, 0x50, 0xB9, 3, 0, 0, 0, 0xE2, 0xFE, 0xE6, 0x80];
    let mut guest = Guest::new_64_bit(engine, &code);
    for offset in [2, 6, 7, 12, 12, 12, 14] {
        guest.debug(&STEP);
        guest.stops(DebugStop::Step);
        assert_eq!(guest.rip(), CODE + offset);
    }
    let registers = guest.vcpu.registers().expect("state");
    assert_eq!((registers.gpr[0], registers.gpr[1], registers.gpr[4]), (1, 0, STACK - 8));
    assert_eq!(registers.rflags >> 8 & 1, 0, "the guest's TF");
    guest.debug(&OFF);
    assert_eq!(guest.out(), 1);
}

fn step_over_an_access(engine: Engine) {
    // in al, 0x81 ; out 0x80, al ; hlt
    let mut guest = Guest::new_64_bit(engine, &[0xE4, 0x81, 0xE6, 0x80, 0xF4]);
    guest.debug(&STEP);
    assert_eq!(guest.run(), Exit::PortIn { port: 0x81, size: 1 });
    guest.vcpu.reply(Reply::Value(7));
    guest.stops(DebugStop::Step);
    assert_eq!(guest.rip(), CODE + 2);
    guest.debug(&OFF);
    assert_eq!(guest.out(), 7);
}

fn software_breakpoint(engine: Engine) {
    if !has_all_breakpoints(engine) {
        return;
    }
    // mov al, 9 ; nop ; out 0x80, al ; jmp -7
    let mut guest = Guest::new_64_bit(engine, &[0xB0, 9, 0x90, 0xE6, 0x80, 0xEB, 0xF9]);
    assert_eq!(guest.out(), 9);
    guest.settle();
    guest.write(CODE + 2, &[0xCC]);
    guest.debug(&SOFTWARE);
    for _ in 0..2 {
        guest.stops(DebugStop::Software { linear: CODE + 2 });
        assert_eq!(guest.rip(), CODE + 2);
    }
    guest.write(CODE + 2, &[0x90]);
    assert_eq!(guest.out(), 9);
}

fn foreign_int3(engine: Engine) {
    if !has_all_breakpoints(engine) {
        return;
    }
    // Real mode: nop ; int3 ; the handler: pop ax ; out 0x80, ax
    let mut guest = Guest::new(engine, &[0x90, 0xCC]);
    guest.write(0x2000, &[0x58, 0xE7, 0x80]);
    guest.write(3 * 4, &0x2000u32.to_le_bytes());
    guest.debug(&SOFTWARE);
    assert_eq!(guest.run(), Exit::Debug(DebugStop::Software { linear: CODE + 1 }));
    guest.vcpu.reply(Reply::Fault(GuestFault { vector: 3, error: None, address: 0 }));
    assert_eq!(u64::from(guest.out()), CODE + 2);
}

fn execute_breakpoint(engine: Engine) {
    if !has_breakpoints(engine) {
        return;
    }
    // mov al, 1 ; out 0x80, al ; inc eax ; jmp -6
    let code = [0xB0, 1, 0xE6, 0x80, 0xFF, 0xC0, 0xEB, 0xFA];
    let mut guest = Guest::new_64_bit(engine, &code);
    guest.debug(&hardware(2, Watched::Execute, CODE + 4, 1));
    assert_eq!(guest.out(), 1);
    guest.stops(DebugStop::Hardware { hits: 4 });
    assert_eq!(guest.rip(), CODE + 4);
    guest.debug(&OFF);
    assert_eq!(guest.out(), 2);
}

fn watchpoints(engine: Engine) {
    if !has_all_breakpoints(engine) {
        return;
    }
    // mov rbx, 0x3000 ; mov eax, [rbx] ; mov [rbx + 4], eax ; mov [rbx + 2], al ; out 0x80, al
    let code =
        [0x48, 0xC7, 0xC3, 0, 0x30, 0, 0, 0x8B, 0x03, 0x89, 0x43, 4, 0x88, 0x43, 2, 0xE6, 0x80];
    for (watched, stops) in [(Watched::Write, &[15][..]), (Watched::Access, &[9, 15][..])] {
        let mut guest = Guest::new_64_bit(engine, &code);
        guest.debug(&hardware(1, watched, 0x3000, 4));
        for stop in stops {
            guest.stops(DebugStop::Hardware { hits: 2 });
            assert_eq!(guest.rip(), CODE + stop);
        }
        guest.out();
    }
}

fn unseen(engine: Engine) {
    // Real mode: mov eax, dr7 ; out 0x80, eax ; mov eax, dr0 ; out 0x80, eax ;
    // mov eax, dr6 ; out 0x80, eax
    let code = [
        0x0F, 0x21, 0xF8, 0x66, 0xE7, 0x80, 0x0F, 0x21, 0xC0, 0x66, 0xE7, 0x80, 0x0F, 0x21, 0xF0,
        0x66, 0xE7, 0x80,
    ];
    let mut guest = Guest::new(engine, &code);
    guest.debug(&hardware(0, Watched::Execute, CODE + 6, 1));
    assert_eq!(guest.out(), 0x400);
    guest.stops(DebugStop::Hardware { hits: 1 });
    guest.debug(&hardware(0, Watched::Write, 0x3000, 1));
    assert_eq!(guest.out(), 0);
    assert_eq!(guest.out(), 0xFFFF_0FF0);
}

fn translate(engine: Engine) {
    let mut guest = Guest::new_64_bit(engine, &[0xF4]);
    assert_eq!(guest.vcpu.translate(FRESH + 0x1234), Some(GuestPhys(0x1234)));
    assert_eq!(guest.vcpu.translate(1 << 40), None);
}
