//! The PC's interval timer, Intel 8254 datasheet (order 231164), and the system control port 61h
//! that gates its third channel (Intel 82371SB datasheet, 2.5.3).
//!
//! Nothing counts: a channel remembers the input clock at which its count was loaded, and every
//! register is a function of the clock now. The clock is `floor(ns * 1193182 / 10^9)` in 128
//! bits, so it never drifts from the machine clock, and an edge's time is the first nanosecond
//! at which that clock has reached it.
//!
//! In mode 3 a new count takes over at the end of the whole period, not of the half period.

use tetrarch_engine::{PitChannelState, PitCounting as Counting, PitState};

use super::BadState;

const HZ: u128 = 1_193_182;
const NS: u128 = 1_000_000_000;
/// Periods shorter than this (about 20 us) are announced as deadlines only this often: their
/// ticks would coalesce in the PIC's request bit anyway.
const MIN_DEADLINE_TICKS: u64 = 24;
/// Bit 4 of port 61h flips with each memory refresh, every 18 clocks (15 us) on a PC.
const REFRESH_TICKS: u64 = 18;

fn ticks(now_ns: u64) -> u64 {
    (u128::from(now_ns) * HZ / NS) as u64
}

fn tick_to_ns(tick: u64) -> u64 {
    u64::try_from((u128::from(tick) * NS).div_ceil(HZ)).unwrap_or(u64::MAX)
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Channel {
    mode: u8,
    access: u8,
    bcd: bool,
    /// The count in the counting element, 1..=0x10000.
    count: u32,
    /// A count written that the counting element has not taken yet.
    reload: Option<u32>,
    counting: Counting,
    first_byte: Option<u8>,
    read_high: bool,
    latch: Option<u16>,
    status: Option<u8>,
    gate: bool,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            // As firmware leaves it, but not running: OUT is high.
            mode: 3,
            access: 3,
            bcd: false,
            count: 0x10000,
            reload: None,
            counting: Counting::Stopped,
            first_byte: None,
            read_high: false,
            latch: None,
            status: None,
            gate,
        }
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x10000 }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn decode(&self, raw: u16) -> u32 {
        let value = if self.bcd {
            (0..4)
                .fold(0, |sum, digit| sum + u32::from(raw >> (4 * digit) & 0xf) * 10u32.pow(digit))
                % 10_000
        } else {
            u32::from(raw)
        };
        match value {
            0 => self.modulus(),
            // Illegal there (p. 11, 13); the shortest legal period stands in.
            1 if self.periodic() => 2,
            value => value,
        }
    }

    fn encode(&self, value: u32) -> u16 {
        let value = value % self.modulus();
        if self.bcd {
            (0..4)
                .fold(0, |raw, digit| raw | ((value / 10u32.pow(digit) % 10) as u16) << (4 * digit))
        } else {
            value as u16
        }
    }

    /// Clocks since the load; None before it.
    fn elapsed(&self, t: u64) -> Option<u64> {
        match self.counting {
            Counting::Stopped => None,
            Counting::Running { start } => t.checked_sub(start),
            Counting::Held { elapsed } => Some(elapsed),
        }
    }

    fn out(&self, t: u64) -> bool {
        let Some(e) = self.elapsed(t) else {
            return self.mode != 0;
        };
        let n = u64::from(self.count);
        match self.mode {
            0 | 1 => e >= n,
            2 => !self.gate || e % n != n - 1,
            3 => !self.gate || e % n < n.div_ceil(2),
            _ => e != n,
        }
    }

    fn value(&self, t: u64) -> u16 {
        if self.counting == Counting::Stopped {
            return self.encode(self.reload.unwrap_or(self.count));
        }
        let e = self.elapsed(t).unwrap_or(0);
        let n = u64::from(self.count);
        let m = u64::from(self.modulus());
        let value = match self.mode {
            2 => n - e % n,
            3 => {
                let half = n.div_ceil(2);
                let phase = e % n;
                let step = if phase < half { phase } else { phase - half };
                (n & !1).saturating_sub(2 * step)
            }
            _ => n + m - e % m,
        };
        self.encode((value % m) as u32)
    }

    fn null_count(&self, t: u64) -> bool {
        self.reload.is_some() || self.elapsed(t).is_none()
    }

    /// Moves from clock `from` to `t`: how often OUT rose on the way.
    fn advance(&mut self, from: u64, t: u64) -> u64 {
        let Counting::Running { mut start } = self.counting else {
            return 0;
        };
        let passed = |edge: u64| u64::from(from < edge && edge <= t);
        let end = start.saturating_add(u64::from(self.count));
        match self.mode {
            0 | 1 => passed(end),
            2 | 3 => {
                let mut edges = 0;
                if t >= end {
                    edges = 1;
                    start = end;
                    self.count = self.reload.take().unwrap_or(self.count);
                    let n = u64::from(self.count);
                    let more = (t - start) / n;
                    edges += more;
                    start += more * n;
                    self.counting = Counting::Running { start };
                }
                edges
            }
            _ => passed(end.saturating_add(1)),
        }
    }

    /// The next clock after `last` at which OUT rises.
    fn next_edge(&self, last: u64) -> Option<u64> {
        let Counting::Running { start } = self.counting else {
            return None;
        };
        let n = u64::from(self.count);
        let edge = match self.mode {
            0 | 1 => start.checked_add(n)?,
            2 | 3 if self.reload.is_some() => start.checked_add(n)?,
            2 | 3 => start.checked_add(n * MIN_DEADLINE_TICKS.div_ceil(n))?,
            _ => start.checked_add(n + 1)?,
        };
        (edge > last).then_some(edge)
    }

    fn start(&mut self, t: u64) {
        // The count reaches the counting element with the clock after the write or trigger.
        self.counting = if self.gate {
            Counting::Running { start: t + 1 }
        } else {
            Counting::Held { elapsed: 0 }
        };
    }

    fn write_count(&mut self, raw: u16, t: u64) {
        let n = self.decode(raw);
        match self.mode {
            1 | 5 => self.reload = Some(n),
            2 | 3 if self.counting != Counting::Stopped => self.reload = Some(n),
            _ => {
                self.count = n;
                self.start(t);
            }
        }
    }

    fn write(&mut self, value: u8, t: u64) {
        match (self.access, self.first_byte) {
            (1, _) => self.write_count(u16::from(value), t),
            (2, _) => self.write_count(u16::from(value) << 8, t),
            (_, None) => {
                self.first_byte = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count and sets OUT low (p. 9).
                    self.counting = Counting::Stopped;
                }
            }
            (_, Some(low)) => {
                self.first_byte = None;
                self.write_count(u16::from_le_bytes([low, value]), t);
            }
        }
    }

    fn read(&mut self, t: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.value(t)).to_le_bytes();
        let (byte, last) = match self.access {
            1 => (low, true),
            2 => (high, true),
            _ => {
                self.read_high = !self.read_high;
                if self.read_high { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.latch = None;
        }
        byte
    }

    fn control(&mut self, value: u8) {
        self.mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode & 3,
        };
        self.access = value >> 4 & 3;
        self.bcd = value & 1 != 0;
        self.reload = None;
        self.counting = Counting::Stopped;
        self.first_byte = None;
        self.read_high = false;
        self.latch = None;
        self.status = None;
    }

    fn latch_count(&mut self, t: u64) {
        if self.latch.is_none() {
            self.latch = Some(self.value(t));
        }
    }

    fn latch_status(&mut self, t: u64) {
        if self.status.is_none() {
            self.status = Some(
                u8::from(self.out(t)) << 7
                    | u8::from(self.null_count(t)) << 6
                    | self.access << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn set_gate(&mut self, gate: bool, t: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate, self.counting) {
            (1 | 5, true, counting) if self.reload.is_some() || counting != Counting::Stopped => {
                self.count = self.reload.take().unwrap_or(self.count);
                self.start(t);
            }
            (1 | 5, ..) => {}
            (_, false, Counting::Running { start }) => {
                self.counting = Counting::Held { elapsed: t.saturating_sub(start) };
            }
            (2 | 3, true, Counting::Held { .. }) => {
                self.count = self.reload.take().unwrap_or(self.count);
                self.start(t);
            }
            (_, true, Counting::Held { elapsed }) => {
                self.counting = Counting::Running { start: t.saturating_sub(elapsed) };
            }
            _ => {}
        }
    }

    fn state(&self) -> PitChannelState {
        PitChannelState {
            mode: self.mode,
            access: self.access,
            bcd: self.bcd,
            count: self.count,
            reload: self.reload,
            counting: self.counting,
            first_byte: self.first_byte,
            read_high: self.read_high,
            latch: self.latch,
            status: self.status,
            gate: self.gate,
        }
    }

    fn restored(state: &PitChannelState) -> Result<Self, BadState> {
        if state.mode > 5 || state.access > 3 {
            return Err(BadState::PitMode { mode: state.mode, access: state.access });
        }
        for n in [Some(state.count), state.reload].into_iter().flatten() {
            if !(1..=0x10000).contains(&n) {
                return Err(BadState::PitCount(n));
            }
        }
        if let Counting::Running { start: clock } | Counting::Held { elapsed: clock } =
            state.counting
        {
            check_clock(clock)?;
        }
        Ok(Self {
            mode: state.mode,
            access: state.access,
            bcd: state.bcd,
            count: state.count,
            reload: state.reload,
            counting: state.counting,
            first_byte: state.first_byte,
            read_high: state.read_high,
            latch: state.latch,
            status: state.status,
            gate: state.gate,
        })
    }
}

/// Room for the arithmetic above; a real clock takes 150,000 years to get there.
fn check_clock(clock: u64) -> Result<(), BadState> {
    if clock > u64::MAX >> 2 { Err(BadState::PitClock(clock)) } else { Ok(()) }
}

/// Three channels. Every access brings them up to `now_ns` first, through [`Pit::sync`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pit {
    channels: [Channel; 3],
    /// The clock that all channels have been advanced to.
    clock: u64,
    /// Bits 0-3 of port 61h as written.
    control: u8,
}

impl Pit {
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            clock: 0,
            control: 0,
        }
    }

    /// Moves to `now_ns`; true if channel 0's OUT rose at least once on the way. A clock that
    /// stands or went back moves nothing.
    pub fn sync(&mut self, now_ns: u64) -> bool {
        let from = self.clock;
        let t = ticks(now_ns).max(from);
        self.clock = t;
        let [edges, ..] = self.channels.each_mut().map(|c| c.advance(from, t));
        edges != 0
    }

    /// Channel 0's OUT, which is ISA IRQ 0.
    pub fn irq0(&self) -> bool {
        self.channels[0].out(self.clock)
    }

    /// When IRQ 0 next rises.
    pub fn next_deadline(&self) -> Option<u64> {
        self.channels[0].next_edge(self.clock).map(tick_to_ns)
    }

    pub fn read(&mut self, port: u16) -> u8 {
        let t = self.clock;
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(t),
            0x61 => {
                let refresh = u8::from(!(t / REFRESH_TICKS).is_multiple_of(2));
                let out2 = u8::from(self.channels[2].out(t));
                self.control | refresh << 4 | out2 << 5
            }
            // The control word register cannot be read (p. 4).
            _ => 0,
        }
    }

    pub fn write(&mut self, port: u16, value: u8) {
        let t = self.clock;
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].write(value, t),
            0x43 => self.write_control(value),
            0x61 => {
                self.control = value & 0xf;
                self.channels[2].set_gate(value & 1 != 0, t);
            }
            _ => {}
        }
    }

    fn write_control(&mut self, value: u8) {
        let t = self.clock;
        match value >> 6 {
            3 => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << index == 0 {
                        continue;
                    }
                    if value & 0x20 == 0 {
                        channel.latch_count(t);
                    }
                    if value & 0x10 == 0 {
                        channel.latch_status(t);
                    }
                }
            }
            index => {
                let channel = &mut self.channels[usize::from(index)];
                if value & 0x30 == 0 {
                    channel.latch_count(t);
                } else {
                    channel.control(value);
                }
            }
        }
    }

    pub fn state(&self) -> PitState {
        PitState {
            clock: self.clock,
            control: self.control,
            channels: self.channels.each_ref().map(Channel::state),
        }
    }

    pub fn restored(state: &PitState) -> Result<Self, BadState> {
        check_clock(state.clock)?;
        if state.control > 0xf {
            return Err(BadState::Port61(state.control));
        }
        let [first, second, third] = state.channels.each_ref().map(Channel::restored);
        Ok(Self { clock: state.clock, control: state.control, channels: [first?, second?, third?] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16) {
        pit.write(0x43, channel << 6 | 0x30 | mode << 1);
        for byte in count.to_le_bytes() {
            pit.write(0x40 + u16::from(channel), byte);
        }
    }

    fn at(pit: &mut Pit, tick: u64) -> bool {
        pit.sync(tick_to_ns(tick))
    }

    fn counter(pit: &mut Pit, channel: u8) -> u16 {
        pit.write(0x43, channel << 6);
        let port = 0x40 + u16::from(channel);
        u16::from_le_bytes([pit.read(port), pit.read(port)])
    }

    #[test]
    fn clock_and_deadline_agree_exactly_and_without_drift() {
        // A day, an hour, and odd values.
        for tick in [0, 1, 2, 3, 1_193_182, 4_295_455_200, 103_090_924_801] {
            let ns = tick_to_ns(tick);
            assert_eq!(ticks(ns), tick);
            assert!(ns == 0 || ticks(ns - 1) == tick - 1);
        }
        assert_eq!(ticks(1_000_000_000), 1_193_182);
    }

    #[test]
    fn mode_2_edges_keep_their_phase_for_an_hour() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 4773); // Linux's HZ=250
        let mut edges = 0u64;
        while let Some(deadline) = pit.next_deadline().filter(|&d| d < 3_600_000_000_000) {
            assert!(!pit.sync(deadline - 1));
            assert!(pit.sync(deadline));
            assert!(pit.irq0());
            edges += 1;
        }
        // Loaded with clock 1, then one edge each 4773 clocks.
        assert_eq!(edges, (3600 * 1_193_182 - 1) / 4773);
    }

    #[test]
    fn mode_2_low_for_the_last_clock_only() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 4);
        let outs: Vec<bool> = (1..9).map(|t| (at(&mut pit, t), pit.irq0()).1).collect();
        assert_eq!(outs, [true, true, true, false, true, true, true, false]);
    }

    #[test]
    fn mode_2_new_count_waits_for_the_period_end() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 100);
        at(&mut pit, 51);
        pit.write(0x40, 10);
        pit.write(0x40, 0);
        assert_eq!(counter(&mut pit, 0), 50);
        assert_eq!(pit.next_deadline(), Some(tick_to_ns(101)));
        assert!(at(&mut pit, 101));
        assert_eq!(counter(&mut pit, 0), 10);
        assert!(at(&mut pit, 111));
    }

    #[test]
    fn missed_ticks_coalesce_and_phase_stays() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 1000);
        assert!(at(&mut pit, 10_500));
        assert_eq!(pit.next_deadline(), Some(tick_to_ns(11_001)));
    }

    #[test]
    fn mode_3_square_wave_even_and_odd() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 3, 5);
        let outs: Vec<bool> = (1..11).map(|t| (at(&mut pit, t), pit.irq0()).1).collect();
        let period = [true, true, true, false, false];
        assert_eq!(outs, [period, period].concat());
        program(&mut pit, 0, 3, 4);
        let outs: Vec<bool> = (11..15).map(|t| (at(&mut pit, t), pit.irq0()).1).collect();
        assert_eq!(outs, [true, true, false, false]);
    }

    #[test]
    fn mode_0_rises_once_after_n_plus_1() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0, 100);
        assert!(!pit.irq0());
        assert_eq!(pit.next_deadline(), Some(tick_to_ns(101)));
        assert!(!at(&mut pit, 100));
        assert!(at(&mut pit, 101));
        assert!(pit.irq0());
        assert_eq!(pit.next_deadline(), None);
        // The counter wraps and goes on.
        at(&mut pit, 103);
        assert_eq!(counter(&mut pit, 0), 0xfffe);
    }

    #[test]
    fn mode_4_strobes_once_and_can_be_rearmed() {
        // Linux's pit_next_event writes only the count.
        let mut pit = Pit::new();
        program(&mut pit, 0, 4, 50);
        assert!(pit.irq0());
        at(&mut pit, 51);
        assert!(!pit.irq0());
        assert!(at(&mut pit, 52));
        assert_eq!(pit.next_deadline(), None);
        at(&mut pit, 1000);
        pit.write(0x40, 20);
        pit.write(0x40, 0);
        assert_eq!(pit.next_deadline(), Some(tick_to_ns(1022)));
        assert!(at(&mut pit, 1022));
    }

    #[test]
    fn channel_2_follows_its_gate() {
        let mut pit = Pit::new();
        program(&mut pit, 2, 0, 1000);
        at(&mut pit, 500);
        assert_eq!(counter(&mut pit, 2), 1000);
        pit.write(0x61, 1);
        at(&mut pit, 700);
        assert_eq!(counter(&mut pit, 2), 800);
        pit.write(0x61, 0);
        at(&mut pit, 5000);
        assert_eq!(counter(&mut pit, 2), 800);
        assert_eq!(pit.read(0x61) & 0x20, 0);
        pit.write(0x61, 1);
        at(&mut pit, 5800);
        assert_eq!(pit.read(0x61) & 0x21, 0x21);
    }

    #[test]
    fn hardware_one_shot_needs_a_gate_edge() {
        let mut pit = Pit::new();
        program(&mut pit, 2, 1, 10);
        at(&mut pit, 100);
        assert_eq!(pit.read(0x61) & 0x20, 0x20);
        pit.write(0x61, 1);
        at(&mut pit, 105);
        assert_eq!(pit.read(0x61) & 0x20, 0);
        at(&mut pit, 111);
        assert_eq!(pit.read(0x61) & 0x20, 0x20);
    }

    #[test]
    fn quick_pit_calibrate_sees_the_high_byte_fall() {
        // Linux: gate on, mode 0, count 0xffff, then reads low and high in turn.
        let mut pit = Pit::new();
        pit.write(0x61, 1);
        program(&mut pit, 2, 0, 0xffff);
        let mut changes = Vec::new();
        let mut last = 0xff;
        for ns in (0..20_000_000).step_by(2000) {
            pit.sync(ns);
            pit.read(0x42);
            let high = pit.read(0x42);
            if high != last {
                changes.push(ns);
                last = high;
            }
        }
        // 256 clocks are 214.55 us.
        assert_eq!(changes.len(), 93);
        for pair in changes.windows(2) {
            assert!((212_000..=217_000).contains(&(pair[1] - pair[0])));
        }
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x31);
        pit.write(0x40, 0x00);
        pit.write(0x40, 0x10);
        at(&mut pit, 2);
        assert_eq!(counter(&mut pit, 0), 0x0999);
        assert!(at(&mut pit, 1001));
        at(&mut pit, 1002);
        assert_eq!(counter(&mut pit, 0), 0x9999);
    }

    #[test]
    fn read_back_gives_status_then_count() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 0x1234);
        pit.write(0x43, 0xc2);
        at(&mut pit, 1);
        assert_eq!(pit.read(0x40), 0xf4); // OUT, null count, both bytes, mode 2
        assert_eq!(pit.read(0x40), 0x34);
        assert_eq!(pit.read(0x40), 0x12);
        pit.write(0x43, 0xe2);
        assert_eq!(pit.read(0x40), 0xb4);
    }

    #[test]
    fn refresh_bit_toggles() {
        let mut pit = Pit::new();
        let before = pit.read(0x61) & 0x10;
        at(&mut pit, 18);
        assert_ne!(pit.read(0x61) & 0x10, before);
    }

    #[test]
    fn shortest_period_does_not_ask_for_a_storm() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 1);
        assert!(pit.next_deadline().is_some_and(|d| d >= 20_000));
    }
}
