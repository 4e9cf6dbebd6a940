//! Saved states that somebody else wrote.

use std::time::Duration;

use tetrarch_engine::{Vcpu, VcpuState, Vm, VmState};

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
