//! The kernel's PICs, I/O APIC and PIT between KVM's form and the contract's.
//!
//! Two things KVM does not tell or take. It keeps no level of a line but those
//! that an interrupt still waits for, so a device that drives an edge-triggered
//! line high again after loading gives one more edge. And loading starts the
//! PIT's counters anew: channel 0 ticks a whole period later.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use tetrarch_engine::{
    ChipsetState, EngineError, IoapicState, PicState, PitChannelState, PitCounting, PitState,
};

use crate::error::refused;

const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// Inputs whose trigger mode ELCR may change (Intel 82371SB, 2.5.5.8).
const ELCR_MASK: [u8; 2] = [0xF8, 0xDE];
/// Redirection entries: level-triggered (82093AA, 3.2.4).
const RTE_LEVEL: u64 = 1 << 15;
/// KVM_PIT_FLAGS_SPEAKER_DATA_ON (asm/kvm.h).
const SPEAKER_ON: u32 = 1 << 1;
const PIT_HZ: u128 = 1_193_182;

fn chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, EngineError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).map_err(|error| refused("read interrupt controllers", error))?;
    Ok(chip)
}

/// `now_ns` is machine time.
pub fn save(vm: &VmFd, now_ns: u64) -> Result<ChipsetState, EngineError> {
    let pic = |id| -> Result<PicState, EngineError> {
        // SAFETY: the kernel filled the part that belongs to a PIC.
        Ok(pic_state(&unsafe { chip(vm, id)?.chip.pic }))
    };
    let pics = [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?];
    // SAFETY: as above, of the I/O APIC.
    let raw = unsafe { chip(vm, KVM_IRQCHIP_IOAPIC)?.chip.ioapic };
    let ioapic = IoapicState {
        select: raw.ioregsel as u8,
        id: raw.id as u8,
        lines: raw.irr,
        // SAFETY: both fields of the union are the same 64 bits.
        entries: raw.redirtbl.map(|entry| unsafe { entry.bits }),
    };
    let pit = vm.get_pit2().map_err(|error| refused("read the interval timer", error))?;
    // Levels of ISA lines are in the PICs; input 2 is the cascade.
    let isa = u32::from(pics[0].lines & !(1 << 2)) | u32::from(pics[1].lines) << 8;
    let lines = isa | raw.irr & !0xFFFF;
    Ok(ChipsetState { lines, pics, ioapic, pit: pit_state(&pit, now_ns) })
}

pub fn load(vm: &VmFd, state: &ChipsetState) -> Result<(), EngineError> {
    let pit = kvm_pit(&state.pit)?;
    let failed = |error| refused("set interrupt controllers", error);
    for (chip_id, (pic, mask)) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE]
        .into_iter()
        .zip(state.pics.iter().zip(ELCR_MASK))
    {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        let mut pic = *pic;
        if chip_id == KVM_IRQCHIP_PIC_MASTER {
            // The kernel's PIT only pulses its line. A pulse on one that is high
            // is lost, and the PIT would wait for its acknowledgement for ever.
            pic.lines &= !1;
        }
        chip.chip.pic = kvm_pic(&pic, mask);
        vm.set_irqchip(&chip).map_err(failed)?;
    }
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    // SAFETY: plain numbers, zero by now.
    let ioapic = unsafe { &mut chip.chip.ioapic };
    ioapic.base_address = IOAPIC_BASE;
    ioapic.ioregsel = state.ioapic.select.into();
    ioapic.id = state.ioapic.id.into();
    for (index, (entry, &bits)) in ioapic.redirtbl.iter_mut().zip(&state.ioapic.entries).enumerate()
    {
        entry.bits = bits;
        // The kernel raises an edge for each bit; a level that is high and
        // edge-triggered has had its interrupt.
        if bits & RTE_LEVEL != 0 {
            ioapic.irr |= state.ioapic.lines & 1 << index;
        }
    }
    vm.set_irqchip(&chip).map_err(failed)?;
    vm.set_pit2(&pit).map_err(|error| refused("set the interval timer", error))
}

fn pic_state(pic: &kvm_pic_state) -> PicState {
    PicState {
        lines: pic.last_irr,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        elcr: pic.elcr,
        base: pic.irq_base,
        highest: pic.priority_add,
        // KVM counts the words that follow ICW1.
        awaits: if pic.init_state == 0 { 0 } else { pic.init_state + 1 },
        icw4_follows: pic.init4 != 0,
        single: false,
        auto_eoi: pic.auto_eoi != 0,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi != 0,
        special_fully_nested: pic.special_fully_nested_mode != 0,
        special_mask: pic.special_mask != 0,
        poll: pic.poll != 0,
        read_isr: pic.read_reg_select != 0,
    }
}

fn kvm_pic(pic: &PicState, elcr_mask: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: pic.lines,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.highest & 7,
        irq_base: pic.base & 0xF8,
        read_reg_select: pic.read_isr.into(),
        poll: pic.poll.into(),
        special_mask: pic.special_mask.into(),
        init_state: pic.awaits.saturating_sub(1).min(3),
        auto_eoi: pic.auto_eoi.into(),
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: pic.special_fully_nested.into(),
        init4: pic.icw4_follows.into(),
        elcr: pic.elcr & elcr_mask,
        elcr_mask,
    }
}

fn clocks(ns: u64) -> u64 {
    (u128::from(ns) * PIT_HZ / 1_000_000_000) as u64
}

/// The host's clock by which the kernel notes when a count was loaded.
fn monotonic_ns() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Bytes of a latch or of a count: KVM's RW_STATE_ of arch/x86/kvm/i8254.c.
const WORD_HIGH: u8 = 4;

fn pit_state(pit: &kvm_pit_state2, now_ns: u64) -> PitState {
    let host_ns = monotonic_ns();
    let channel = |raw: &kvm_pit_channel_state| {
        let count = match raw.count {
            0 => 0x1_0000,
            count => count.min(0x1_0000),
        };
        let since = host_ns.saturating_sub(raw.count_load_time).max(0) as u64;
        let since = if raw.count_load_time > 0 { since } else { 0 };
        // A counter that began before the machine did is in step with one that
        // began whole periods later.
        let elapsed = clocks(since);
        let elapsed = if elapsed > clocks(now_ns) { elapsed % u64::from(count) } else { elapsed };
        PitChannelState {
            mode: raw.mode.min(5),
            access: raw.rw_mode & 3,
            bcd: raw.bcd != 0,
            count,
            reload: None,
            // KVM's counters count from the control word on.
            counting: if raw.gate == 0 && raw.mode != 1 && raw.mode != 5 {
                PitCounting::Held { elapsed: 0 }
            } else {
                PitCounting::Running { start: clocks(now_ns).saturating_sub(elapsed) }
            },
            first_byte: (raw.write_state == WORD_HIGH).then_some(raw.write_latch),
            read_high: raw.read_state == WORD_HIGH,
            latch: (raw.count_latched != 0).then_some(raw.latched_count),
            status: (raw.status_latched != 0).then_some(raw.status),
            gate: raw.gate != 0,
        }
    };
    PitState {
        clock: clocks(now_ns),
        control: pit.channels[2].gate & 1 | u8::from(pit.flags & SPEAKER_ON != 0) << 1,
        channels: [channel(&pit.channels[0]), channel(&pit.channels[1]), channel(&pit.channels[2])],
    }
}

fn kvm_pit(pit: &PitState) -> Result<kvm_pit_state2, EngineError> {
    let mut out = kvm_pit_state2::default();
    for (raw, channel) in out.channels.iter_mut().zip(&pit.channels) {
        if channel.mode > 5 || channel.access > 3 || !(1..=0x1_0000).contains(&channel.count) {
            return Err(EngineError::Refused(
                "engine kvm cannot take up this interval timer: mode, access or count is none"
                    .into(),
            ));
        }
        let half = |high: bool| match channel.access {
            3 if high => WORD_HIGH,
            access => access,
        };
        *raw = kvm_pit_channel_state {
            count: channel.reload.unwrap_or(channel.count),
            latched_count: channel.latch.unwrap_or(0),
            count_latched: if channel.latch.is_some() { half(channel.read_high) } else { 0 },
            status_latched: channel.status.is_some().into(),
            status: channel.status.unwrap_or(0),
            read_state: half(channel.read_high),
            write_state: half(channel.first_byte.is_some()),
            write_latch: channel.first_byte.unwrap_or(0),
            rw_mode: channel.access,
            mode: channel.mode,
            bcd: channel.bcd.into(),
            gate: channel.gate.into(),
            count_load_time: 0,
        };
    }
    out.channels[2].gate = pit.control & 1;
    if pit.control & 2 != 0 {
        out.flags |= SPEAKER_ON;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pic_survives_the_way_there_and_back() {
        let there = PicState {
            lines: 0x12,
            irr: 1,
            imr: 0xFE,
            isr: 4,
            elcr: 0x20,
            base: 0x30,
            highest: 3,
            awaits: 3,
            icw4_follows: true,
            single: false,
            auto_eoi: true,
            rotate_on_auto_eoi: true,
            special_fully_nested: true,
            special_mask: true,
            poll: true,
            read_isr: true,
        };
        assert_eq!(pic_state(&kvm_pic(&there, 0xF8)), there);
    }

    #[test]
    fn registers_of_the_pit_survive_the_way_there_and_back() {
        let channel = PitChannelState {
            mode: 2,
            access: 3,
            count: 1193,
            first_byte: Some(7),
            read_high: true,
            latch: Some(0x1234),
            status: Some(0x34),
            gate: true,
            ..PitChannelState::default()
        };
        let there = PitState { clock: 0, control: 3, channels: [channel; 3] };
        let mut back = pit_state(&kvm_pit(&there).unwrap(), 0);
        // Counters start anew.
        for channel in &mut back.channels {
            assert_eq!(channel.counting, PitCounting::Running { start: 0 });
            channel.counting = PitCounting::Stopped;
        }
        assert_eq!(back, there);
    }

    #[test]
    fn impossible_pit_is_refused() {
        assert!(kvm_pit(&PitState::default()).is_err());
    }
}
