//! Saved states that somebody else wrote.

use std::time::Duration;

use tetrarch_engine::Vm;

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

fn load_irqchip(vm: &dyn Vm, input: &mut Input) {
    let before = vm.save_irqchip();
    let image = image(input, before.clone());
    match vm.load_irqchip(&image) {
        // What the engine accepts it must be able to hand on.
        Ok(()) => {
            let saved = vm.save_irqchip();
            vm.load_irqchip(&saved).expect("what was saved is valid");
            assert!(vm.save_irqchip() == saved, "loading changed the state");
        }
        Err(_) => assert!(vm.save_irqchip() == before, "refused, but changed"),
    }
}

/// Foreign images for interrupt controllers and vector state; then the guest runs.
pub fn state(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(input.bool());
    load_irqchip(&*machine.vm, &mut input);
    let before = machine.vcpu.xsave();
    let image = image(&mut input, before.clone());
    match machine.vcpu.set_xsave(&image) {
        Ok(()) => {
            let saved = machine.vcpu.xsave();
            machine.vcpu.set_xsave(&saved).expect("what was saved is valid");
            assert!(machine.vcpu.xsave() == saved, "loading changed the state");
        }
        Err(_) => assert!(machine.vcpu.xsave() == before, "refused, but changed"),
    }
    let guest = Guest::read(&mut input, false);
    machine.run(&guest, Duration::from_millis(4), None);
}
