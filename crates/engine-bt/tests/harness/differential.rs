//! The same guest on both tiers.

use std::fmt::Write;
use std::time::Duration;

use tetrarch_engine::Exit;

use super::guest::Guest;
use super::input::Input;
use super::machine::{End, Machine, Outcome};

const SHORT: Duration = Duration::from_millis(4);
const LONG: Duration = Duration::from_millis(250);

fn outcome(guest: &Guest, translate: bool, limit: Duration) -> Option<Outcome> {
    Machine::new(translate).run(guest, limit, None)
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
        line("exit", &interpreted.exits.get(first), &translated.exits.get(first));
    }
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

/// Both tiers must come to the same end by the same exits.
pub fn differential(data: &[u8]) {
    let guest = Guest::read(&mut Input::new(data), true);
    let Some(interpreted) = outcome(&guest, false, SHORT) else { return };
    if interpreted.end == End::Kicked {
        return;
    }
    let mut translated = outcome(&guest, true, SHORT);
    if translated.as_ref().is_some_and(|outcome| outcome.end == End::Kicked) {
        translated = outcome(&guest, true, LONG);
    }
    let translated = translated.expect("one tier takes the state, so the other must");
    if interpreted == translated {
        return;
    }
    // A guest that sees the time is not the same twice even on one tier.
    for _ in 0..2 {
        if outcome(&guest, false, LONG).is_none_or(|again| again != interpreted) {
            return;
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
