//! Saved states that somebody else wrote.

use std::time::Duration;

use tetrarch_engine::{
    PendingException, PitCounting, RunState, Segment, Vcpu, VcpuState, Vm, VmState,
};

use super::guest::Guest;
use super::input::Input;
use super::machine::Machine;

/// A valid image with some bytes changed, or bytes that never were one.
fn image(input: &mut Input, valid: Vec<u8>) -> Vec<u8> {
    let edits = input.u8();
    if edits == 0xFF {
        let length = usize::from(input.u16());
        return input.bytes(length).to_vec();
    }
    let mut image = valid;
    for _ in 0..edits % 16 {
        let at = usize::from(input.u16()) % image.len();
        image[at] = input.u8();
    }
    if input.rarely(16) {
        image.truncate(usize::from(input.u16()));
    }
    image
}

/// Damages the encoding below its checksum, which would find any damage.
fn load_chips(vm: &dyn Vm, input: &mut Input) {
    let before = vm.save().expect("no vCPU runs");
    let image = image(input, postcard::to_stdvec(&before).expect("plain values"));
    let Ok(state) = postcard::from_bytes::<VmState>(&image) else { return };
    match vm.load(&state) {
        // What the engine accepts it must be able to hand on.
        Ok(()) => {
            let saved = vm.save().expect("no vCPU runs");
            vm.load(&saved).expect("what was saved is valid");
            let again = vm.save().expect("no vCPU runs");
            assert!(again.chipset == saved.chipset, "loading changed the state");
        }
        Err(_) => {
            let after = vm.save().expect("no vCPU runs");
            assert!(after.chipset == before.chipset, "refused, but changed");
        }
    }
}

fn load_vcpu(vcpu: &mut dyn Vcpu, input: &mut Input) {
    let valid = vcpu.save().expect("between two instructions");
    let image = image(input, postcard::to_stdvec(&valid).expect("plain values"));
    let Ok(state) = postcard::from_bytes::<VcpuState>(&image) else { return };
    if vcpu.load(&state).is_ok() {
        let saved = vcpu.save().expect("between two instructions");
        vcpu.load(&saved).expect("what was saved is valid");
    } else {
        vcpu.load(&valid).expect("what was saved is valid");
    }
}

/// Numbers at which arithmetic and tables end, and any.
fn number(input: &mut Input) -> u64 {
    match input.u8() % 12 {
        0 => 0,
        1 => u64::MAX,
        2 => i64::MAX as u64,
        3 => 1 << 63,
        4 => 1 << 47,
        5 => (1 << 62) + 1,
        6 => u64::from(u32::MAX),
        7 => 1 << (input.u8() % 64),
        8 => u64::MAX - u64::from(input.u8()),
        9 => u64::from(input.u16()),
        10 => u64::from(input.u32()),
        _ => input.u64(),
    }
}

fn segment(input: &mut Input) -> Segment {
    Segment {
        base: number(input),
        limit: number(input) as u32,
        attributes: input.u32(),
        selector: input.u16(),
    }
}

/// Sets a field of a valid state to a value that no engine would have saved.
fn set_vcpu_field(state: &mut VcpuState, input: &mut Input) {
    let system = &mut state.system;
    match input.u8() % 36 {
        0 => state.registers.rip = number(input),
        1 => state.registers.rflags = number(input),
        2 => state.registers.gpr[4] = number(input),
        3 => system.cs = segment(input),
        4 => system.ss = segment(input),
        5 => system.gs = segment(input),
        6 => system.tr = segment(input),
        7 => system.ldt = segment(input),
        8 => system.gs.base = number(input),
        9 => system.gdt.base = number(input),
        10 => system.idt.base = number(input),
        11 => system.idt.limit = input.u16(),
        12 => system.cr0 = number(input),
        13 => system.cr3 = number(input),
        14 => system.cr4 = number(input),
        15 => system.cr8 = number(input),
        16 => system.efer = number(input),
        17 => state.lapic.base = number(input),
        18 => state.debug.dr7 = number(input),
        19 => state.debug.breakpoints[usize::from(input.u8() % 4)] = number(input),
        20 => state.xcr0 = number(input),
        21 => state.tsc = number(input),
        22 => {
            state.events.exception = Some(PendingException {
                vector: input.u8(),
                error: input.bool().then(|| number(input) as u32),
                payload: input.bool().then(|| number(input)),
                injected: input.bool(),
            });
        }
        23 => state.events.interrupt = Some(input.u8()),
        24 => {
            state.events.nmi = input.bool();
            state.events.nmi_blocked = input.bool();
            state.events.shadow_sti = input.bool();
            state.events.shadow_mov_ss = input.bool();
        }
        25 => state.events.init = input.bool(),
        26 => state.events.sipi = Some(input.u8()),
        27 => {
            state.run = match input.u8() % 4 {
                0 => RunState::Runnable,
                1 => RunState::Halted,
                2 => RunState::WaitForSipi,
                _ => RunState::Shutdown,
            };
        }
        28 => {
            let count = usize::from(input.u16()) % 4096;
            state.msrs.resize(count, (input.u32(), number(input)));
        }
        29 => {
            let at = usize::from(input.u16()) % state.msrs.len().max(1);
            if let Some((_, value)) = state.msrs.get_mut(at) {
                *value = number(input);
            }
        }
        30 => {
            let indices = [0x10, 0x1B, 0x6E0, 0x808, 0x80B, 0x830, 0x838, 0xC000_0080, 0x4B56_4D01];
            let index = indices[usize::from(input.u8()) % indices.len()];
            state.msrs.push((index, number(input)));
        }
        31 => {
            let at = usize::from(input.u8()) % state.lapic.registers.len().max(1);
            if let Some(register) = state.lapic.registers.get_mut(at) {
                *register = number(input) as u32;
            }
        }
        32 => state.lapic.timer_left_ns = Some(number(input) as i64),
        33 => state.lapic.tsc_deadline = number(input),
        34 => state.lapic.registers.resize(usize::from(input.u8()), 0),
        _ => {
            let at = usize::from(input.u16()) % state.xsave.len().max(1);
            if let Some(byte) = state.xsave.get_mut(at) {
                *byte = input.u8();
            }
        }
    }
}

fn set_vm_field(state: &mut VmState, input: &mut Input) {
    let chipset = &mut state.chipset;
    let channel = &mut chipset.pit.channels[usize::from(input.u8() % 3)];
    match input.u8() % 12 {
        0 => state.clock_ns = number(input),
        1 => state.kvmclock_ns = number(input),
        2 => chipset.lines = number(input) as u32,
        3 => chipset.ioapic.entries[usize::from(input.u8() % 24)] = number(input),
        4 => chipset.ioapic.lines = number(input) as u32,
        5 => chipset.pit.clock = number(input),
        6 => channel.counting = PitCounting::Running { start: number(input) },
        7 => channel.counting = PitCounting::Held { elapsed: number(input) },
        8 => channel.count = number(input) as u32,
        9 => channel.reload = Some(number(input) as u32),
        10 => (channel.mode, channel.bcd) = (input.u8() % 8, input.bool()),
        _ => {
            let pic = &mut chipset.pics[usize::from(input.u8() % 2)];
            (pic.irr, pic.isr, pic.imr) = (input.u8(), input.u8(), input.u8());
            (pic.highest, pic.awaits, pic.base) = (input.u8(), input.u8(), input.u8());
        }
    }
}

/// A guest goes on from a state with fields that make no sense.
pub fn saved(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(input.bool());
    let fields = input.u8() % 8;
    let (mut vm, fields_of_vm) = (machine.vm.save().expect("no vCPU runs"), input.u8() % 4);
    (0..fields_of_vm).for_each(|_| set_vm_field(&mut vm, &mut input));
    let taken = machine.vm.load(&vm).is_ok();
    if taken {
        let now = machine.vm.clock().now_ns();
        assert!(now >= vm.clock_ns && now - vm.clock_ns < HOUR_NS, "{now} of {}", vm.clock_ns);
    }
    let edits = input.bytes(usize::from(fields) * 12);
    let guest = Guest::read(&mut input, false);
    if !guest.load(&machine.memory, &mut *machine.vcpu) {
        return;
    }
    // The guest was led through a few instructions where it has AVX.
    let Ok(mut state) = machine.vcpu.save() else { return };
    let mut edits = Input::new(edits);
    (0..fields).for_each(|_| set_vcpu_field(&mut state, &mut edits));
    if machine.vcpu.load(&state).is_err() {
        return;
    }
    let again = machine.vcpu.save().expect("between two instructions");
    machine.vcpu.load(&again).expect("what was saved is valid");
    machine.go_on(&guest, Duration::from_millis(4), None);
    // In the middle of an instruction there is nothing to save.
    if let Ok(state) = machine.vcpu.save() {
        machine.vcpu.load(&state).expect("what was saved is valid");
    }
}

const HOUR_NS: u64 = 3_600_000_000_000;

/// Foreign images for interrupt controllers and vector state; then the guest runs.
pub fn state(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(input.bool());
    load_chips(&*machine.vm, &mut input);
    load_vcpu(&mut *machine.vcpu, &mut input);
    let before = machine.vcpu.xsave().expect("state");
    let image = image(&mut input, before.clone());
    match machine.vcpu.set_xsave(&image) {
        Ok(()) => {
            let saved = machine.vcpu.xsave().expect("state");
            machine.vcpu.set_xsave(&saved).expect("what was saved is valid");
            assert!(machine.vcpu.xsave().expect("state") == saved, "loading changed the state");
        }
        Err(_) => assert!(machine.vcpu.xsave().expect("state") == before, "refused, but changed"),
    }
    let guest = Guest::read(&mut input, false);
    machine.run(&guest, Duration::from_millis(4), None);
}
