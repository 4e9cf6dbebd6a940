//! Interrupt lines, wired-or: a line is high while any of its sources is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Takes a line's level to the interrupt controllers.
pub type Drive = Box<dyn Fn(u32, bool) + Send + Sync>;

/// The lines of one machine, by global system interrupt.
///
/// Lock: one a line, held while the controllers are told, so that they hear of
/// changes in their order; the controllers' own come after it, and nothing
/// that they call takes it.
pub struct IrqLines {
    drive: Drive,
    /// How many sources hold each line high.
    high: Box<[Mutex<u32>]>,
}

impl IrqLines {
    pub fn new(count: u32, drive: Drive) -> Self {
        Self { drive, high: (0..count).map(|_| Mutex::default()).collect() }
    }

    /// A source of its own, low at first; `None` where there is no such line.
    pub fn source(self: &Arc<Self>, gsi: u32) -> Option<IrqSource> {
        self.high.get(gsi as usize)?;
        Some(IrqSource { lines: Arc::clone(self), gsi, level: AtomicBool::new(false) })
    }

    /// Tells controllers that were reset, and know of no line, which are high.
    pub fn drive_high(&self) {
        for (gsi, high) in (0..).zip(&self.high) {
            let high = high.lock();
            if *high > 0 {
                (self.drive)(gsi, true);
            }
        }
    }
}

/// One device's wire to a line. A device that goes away lets go of the line.
pub struct IrqSource {
    lines: Arc<IrqLines>,
    gsi: u32,
    /// Changed under the line's lock alone.
    level: AtomicBool,
}

impl IrqSource {
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    pub fn set(&self, level: bool) {
        let mut high = self.lines.high[self.gsi as usize].lock();
        self.change(&mut high, level);
    }

    /// High and low again: an edge, unless another source holds the line high.
    /// Leaves the source low.
    pub fn pulse(&self) {
        let mut high = self.lines.high[self.gsi as usize].lock();
        self.change(&mut high, true);
        self.change(&mut high, false);
    }

    fn change(&self, high: &mut u32, level: bool) {
        if self.level.swap(level, Ordering::Relaxed) == level {
            return;
        }
        let before = *high > 0;
        *high = if level { *high + 1 } else { *high - 1 };
        if before != (*high > 0) {
            (self.lines.drive)(self.gsi, level);
        }
    }
}

impl Drop for IrqSource {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Seen = Arc<Mutex<Vec<(u32, bool)>>>;

    fn lines() -> (Arc<IrqLines>, Seen) {
        let seen = Seen::default();
        let log = Arc::clone(&seen);
        let drive = Box::new(move |gsi, level| log.lock().push((gsi, level)));
        (Arc::new(IrqLines::new(24, drive)), seen)
    }

    #[test]
    fn line_is_high_while_one_source_is() {
        let (lines, seen) = lines();
        let (first, second) = (lines.source(11).unwrap(), lines.source(11).unwrap());
        first.set(true);
        second.set(true);
        second.set(true);
        first.set(false);
        assert_eq!(*seen.lock(), [(11, true)], "the second still holds it");
        second.set(false);
        assert_eq!(*seen.lock(), [(11, true), (11, false)]);
        second.set(false);
        assert_eq!(seen.lock().len(), 2);
    }

    #[test]
    fn pulse_is_an_edge_on_a_free_line_alone() {
        let (lines, seen) = lines();
        let (first, second) = (lines.source(5).unwrap(), lines.source(5).unwrap());
        first.pulse();
        assert_eq!(*seen.lock(), [(5, true), (5, false)]);
        first.set(true);
        second.pulse();
        assert_eq!(seen.lock().len(), 3);
        first.pulse();
        assert_eq!(seen.lock()[2..], [(5, true), (5, false)], "a pulse ends low");
    }

    #[test]
    fn source_that_goes_away_lets_go_of_the_line() {
        let (lines, seen) = lines();
        let source = lines.source(0).unwrap();
        source.set(true);
        drop(source);
        assert_eq!(*seen.lock(), [(0, true), (0, false)]);
        assert!(lines.source(24).is_none());
    }

    #[test]
    fn controllers_that_were_reset_hear_of_each_high_line_once() {
        let (lines, seen) = lines();
        let (first, second) = (lines.source(7).unwrap(), lines.source(7).unwrap());
        let low = lines.source(8).unwrap();
        first.set(true);
        second.set(true);
        low.pulse();
        seen.lock().clear();
        lines.drive_high();
        assert_eq!(*seen.lock(), [(7, true)]);
    }

    #[test]
    fn line_ends_as_its_sources_say_whatever_they_did_at_once() {
        let (lines, seen) = lines();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let source = lines.source(9).unwrap();
                scope.spawn(move || {
                    for turn in 0..1000 {
                        source.set(turn % 3 != 0);
                    }
                    drop(source);
                });
            }
        });
        let seen = seen.lock();
        // Each change is told once: the levels alternate and end low.
        assert!(seen.iter().enumerate().all(|(i, &(_, level))| level == (i % 2 == 0)));
        assert_eq!(seen.len() % 2, 0);
    }
}
