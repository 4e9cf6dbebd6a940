//! The same guest on both tiers.

use std::fmt::Write;
use std::time::Duration;

use tetrarch_engine::Exit;

use super::guest::Guest;
use super::input::Input;
use super::machine::{End, Machine, Outcome};

const SHORT: Duration = Duration::from_millis(4);
/// Code that never repeats, and whose stores all hit a page of code, is slow to
/// translate, the more so on a busy host.
const LONG: Duration = Duration::from_secs(20);

fn outcome(guest: &Guest, translate: bool, limit: Duration) -> Option<Outcome> {
    let mut machine = Machine::new(translate);
    // The refresh bit of port 0x61 and the counts of timers stand, at the same values.
    machine.vm.clock().stop().expect("the engine's own clock can stand");
    machine.vm.clock().set_ns(0);
    machine.run(guest, limit, None)
}

/// What differs, in words.
fn difference(interpreted: &Outcome, translated: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |name: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        let (a, b) = (format!("{a:x?}"), format!("{b:x?}"));
        if a != b {
            let _ = writeln!(text, "{name}:\n  interpreted {a}\n  translated  {b}");
        }
    };
    line("end", &interpreted.end, &translated.end);
    let differ = |(a, b): (&Exit, &Exit)| a != b;
    let both = interpreted.exits.iter().zip(&translated.exits);
    let first = both
        .clone()
        .position(differ)
        .unwrap_or(interpreted.exits.len().min(translated.exits.len()));
    if interpreted.exits != translated.exits {
        line("first different exit", &first, &"");
        let from = |exits: &[Exit]| exits[first..exits.len().min(first + 4)].to_vec();
        line("exits from there", &from(&interpreted.exits), &from(&translated.exits));
    }
    line("places", &interpreted.places, &translated.places);
    line("registers", &interpreted.registers, &translated.registers);
    line("system registers", &interpreted.system, &translated.system);
    for (at, (a, b)) in interpreted.xsave.iter().zip(&translated.xsave).enumerate() {
        line(&format!("xsave {at}"), a, b);
    }
    let memory = interpreted.memory.iter().zip(&translated.memory);
    for (at, (a, b)) in memory.enumerate().filter(|(_, (a, b))| a != b).take(16) {
        line(&format!("memory {at:#x}"), a, b);
    }
    text
}

/// What a run of [`differential`] has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compared {
    /// Both tiers came to the same end.
    Same,
    /// The engine refuses the guest's state.
    Refused,
    /// Interpreting it took longer than [`SHORT`], twice: it may have no end.
    Endless,
    /// It is not the same twice even on one tier, as a guest that sees the time.
    NotRepeatable,
}

/// Both tiers must come to the same end by the same exits.
pub fn differential(data: &[u8]) -> Compared {
    let guest = Guest::read(&mut Input::new(data), true);
    let Some(mut interpreted) = outcome(&guest, false, SHORT) else { return Compared::Refused };
    if interpreted.end == End::Kicked {
        // On a host that is busy a short guest can take long: once more, with time.
        match outcome(&guest, false, 8 * SHORT) {
            Some(again) if again.end != End::Kicked => interpreted = again,
            _ => return Compared::Endless,
        }
    }
    let mut translated = outcome(&guest, true, SHORT);
    if translated.as_ref().is_some_and(|outcome| outcome.end == End::Kicked) {
        translated = outcome(&guest, true, LONG);
    }
    let translated = translated.expect("one tier takes the state, so the other must");
    if interpreted == translated {
        return Compared::Same;
    }
    // A guest that sees the time is not the same twice even on one tier.
    for _ in 0..2 {
        if outcome(&guest, false, LONG).is_none_or(|again| again != interpreted) {
            return Compared::NotRepeatable;
        }
    }
    panic!(
        "the tiers differ ({:?}, code at {:#x})\n{}{}{}",
        guest.mode,
        guest.code_at,
        guest.code.disassembly(guest.mode.bits(), guest.code_at),
        shortest(&guest),
        difference(&interpreted, &translated)
    );
}

/// The least code from the start on which the tiers differ.
fn shortest(guest: &Guest) -> String {
    for count in 1..guest.code.starts.len() {
        let mut short = guest.clone();
        short.code.truncate(count);
        let (a, b) = (outcome(&short, false, SHORT), outcome(&short, true, SHORT));
        if let (Some(a), Some(b)) = (a, b)
            && a != b
            && a.end != End::Kicked
            && b.end != End::Kicked
        {
            let start = guest.code_at + u64::from(guest.code.starts[count]);
            return format!(
                "already with the code before {start:#x}:\n{}\nand in all:\n",
                difference(&a, &b)
            );
        }
    }
    String::new()
}
