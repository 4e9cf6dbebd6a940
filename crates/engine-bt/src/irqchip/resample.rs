//! Lines that are high until the guest ends the interrupt: their device, behind an
//! event, then says whether it still wants service.

use super::{IrqChip, Legacy, Message, ioapic};

/// Told of lines, a bit each, whose interrupt has ended; called with no lock of the
/// interrupt chip held.
pub type Resampler = Box<dyn Fn(u32) + Send + Sync>;

/// A bit for each line.
#[derive(Clone, Default)]
pub(super) struct Resample {
    /// Lines whose ends somebody waits for.
    pub watched: u32,
    /// High until the next end, beside what devices drive.
    pub high: u32,
    /// Ended, and to be told when the lock is free.
    pub due: u32,
}

impl Legacy {
    /// The guest has ended the interrupts of these lines.
    pub(super) fn ended(&mut self, gsis: u32, send: &mut dyn FnMut(&Message) -> bool) {
        let due = gsis & self.resample.watched;
        self.resample.due |= due;
        self.let_go(due, send);
    }

    /// A local APIC's EOI message.
    pub(super) fn eoi(&mut self, vector: u8, send: &mut dyn FnMut(&Message) -> bool) {
        // While the pins are in service: a line that is let go gives no interrupt more.
        self.ended(self.ioapic.in_service(vector), send);
        self.ioapic.eoi(vector, send);
    }

    pub(super) fn write_ioapic(
        &mut self,
        offset: u32,
        value: u32,
        send: &mut dyn FnMut(&Message) -> bool,
    ) {
        if offset == ioapic::EOI {
            self.eoi(value as u8, send);
            return;
        }
        // Served while it was masked, as by a threaded handler of Linux: only the device
        // knows whether it still wants service. So does KVM (arch/x86/kvm/ioapic.c,
        // ioapic_write_indirect).
        if let Some(pin) = self.ioapic.unmasks(offset, value) {
            self.ended(self.resample.high & 1 << pin, send);
        }
        self.ioapic.write(offset, value, send);
    }

    fn let_go(&mut self, gsis: u32, send: &mut dyn FnMut(&Message) -> bool) {
        let high = self.resample.high & gsis;
        self.resample.high &= !high;
        for gsi in (0..u32::BITS).filter(|gsi| high >> gsi & 1 != 0) {
            self.apply(gsi, send);
        }
    }
}

impl IrqChip {
    /// To be set once, before the guest runs.
    pub fn set_resampler(&self, resampler: Resampler) {
        let _ = self.resampler.set(resampler);
    }

    pub(super) fn tell_ended(&self, gsis: u32) {
        if gsis != 0
            && let Some(resampler) = self.resampler.get()
        {
            resampler(gsis);
        }
    }

    /// Whether somebody waits for ends of the line's interrupts.
    pub fn watch_ends(&self, gsi: u32, watched: bool) {
        let bit = 1u32.checked_shl(gsi).unwrap_or(0);
        self.with_legacy(|legacy, send| {
            if watched {
                legacy.resample.watched |= bit;
            } else {
                legacy.resample.watched &= !bit;
                legacy.let_go(bit, send);
            }
        });
    }

    /// Raises a watched line until the guest ends its interrupt.
    pub fn raise_until_end(&self, gsi: u32) {
        let bit = 1u32.checked_shl(gsi).unwrap_or(0);
        self.with_legacy(|legacy, send| {
            if legacy.resample.watched & bit != 0 {
                legacy.resample.high |= bit;
                legacy.apply(gsi, send);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use crate::irqchip::tests::Bench;

    const VECTOR: u8 = 0x41;
    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;

    /// With an entry for pin 10, and what the resampler was told.
    fn bench(entry: u32) -> (Bench, Arc<Mutex<Vec<u32>>>) {
        let (bench, told) = (Bench::new(1), Arc::<Mutex<Vec<u32>>>::default());
        let list = Arc::clone(&told);
        bench.chip.set_resampler(Box::new(move |gsis| list.lock().push(gsis)));
        bench.entry(10, entry, 0);
        bench.chip.watch_ends(10, true);
        (bench, told)
    }

    fn told(list: &Mutex<Vec<u32>>) -> Vec<u32> {
        std::mem::take(&mut *list.lock())
    }

    #[test]
    fn line_is_let_go_at_each_end() {
        let (bench, list) = bench(u32::from(VECTOR) | LEVEL);
        for end in [
            &(|bench: &Bench| bench.set(0, 0xB0, 0)) as &dyn Fn(&Bench),
            // The I/O APIC's own register, and then the local APIC's.
            &|bench| {
                bench.chip.ioapic_write(0x40, VECTOR.into());
                bench.set(0, 0xB0, 0);
            },
        ] {
            bench.chip.raise_until_end(10);
            assert_eq!(bench.chip.accept(0), Some(VECTOR));
            assert!(told(&list).is_empty());
            end(&bench);
            assert_eq!(told(&list), [1 << 10]);
            assert_eq!(bench.chip.accept(0), None);
        }
    }

    #[test]
    fn unmasking_asks_the_device_first() {
        let (bench, list) = bench(u32::from(VECTOR) | LEVEL | MASKED);
        bench.chip.raise_until_end(10);
        bench.entry(10, u32::from(VECTOR) | LEVEL, 0);
        assert_eq!((told(&list), bench.chip.accept(0)), (vec![1 << 10], None));
        bench.chip.raise_until_end(10);
        assert_eq!(bench.chip.accept(0), Some(VECTOR));
        // A line that a device holds needs no question.
        bench.set(0, 0xB0, 0);
        bench.entry(10, u32::from(VECTOR) | LEVEL | MASKED, 0);
        bench.chip.irq_line(10, true, 0);
        told(&list);
        bench.entry(10, u32::from(VECTOR) | LEVEL, 0);
        assert_eq!((told(&list), bench.chip.accept(0)), (vec![], Some(VECTOR)));
    }

    #[test]
    fn saved_state_has_no_level_of_an_event() {
        let (bench, list) = bench(u32::from(VECTOR) | LEVEL);
        let before = bench.chip.chipset();
        bench.chip.irq_line(10, true, 0);
        let driven = bench.chip.chipset();
        bench.chip.irq_line(10, false, 0);
        bench.chip.raise_until_end(10);
        let state = bench.chip.chipset();
        assert_eq!((state.lines, state.ioapic.lines), (before.lines, before.ioapic.lines));
        bench.chip.irq_line(10, true, 0);
        let state = bench.chip.chipset();
        assert_eq!((state.lines, state.ioapic.lines), (driven.lines, driven.ioapic.lines));
        assert!(told(&list).is_empty());
        bench.chip.set_chipset(&before).expect("as saved");
        assert_eq!(told(&list), [1 << 10]);
    }

    #[test]
    fn line_that_nobody_watches_is_not_raised() {
        let (bench, list) = bench(u32::from(VECTOR) | LEVEL);
        bench.chip.watch_ends(10, false);
        bench.chip.raise_until_end(10);
        bench.chip.raise_until_end(40);
        assert_eq!(bench.chip.accept(0), None);
        bench.chip.watch_ends(10, true);
        bench.chip.raise_until_end(10);
        assert_eq!(bench.chip.accept(0), Some(VECTOR));
        bench.chip.watch_ends(10, false);
        bench.set(0, 0xB0, 0);
        assert_eq!((told(&list), bench.chip.accept(0)), (vec![], None));
    }
}
