//! The host CPU as the oracle: random programs run natively, interpreted and
//! translated must end alike.
//!
//! `ORACLE_SEED` and `ORACLE_CASES` choose which and how many.

mod support;

use std::io::Write as _;

use support::case::{Case, Outcome, describe, differences};
use support::generate::{Generator, Item, Program};
use support::guest::Guest;
use support::host_cpu::HostCpu;

struct Machines {
    native: HostCpu,
    interpreter: Guest,
    translator: Guest,
}

impl Machines {
    fn new() -> Self {
        // The child first: it is best made while the process has few threads.
        let native = HostCpu::new();
        Self { native, interpreter: Guest::for_cases(false), translator: Guest::for_cases(true) }
    }

    /// What went wrong, one entry for each engine; `None` without a native result.
    fn failures(&mut self, case: &Case) -> Option<Vec<String>> {
        let expected = self.native.run(case)?;
        // What user code cannot reach natively: the upper half, which is the guest
        // kernel's own, and the bit of MXCSR for misaligned operands, which the
        // engine hides (AMD APM 1, 4.2.2).
        let upper_half = expected.fault.vector == 14 && expected.fault.cr2 >> 63 != 0;
        if case.kernel && upper_half || expected.state.fpu.mxcsr & 1 << 17 != 0 {
            return Some(Vec::new());
        }
        let mut failures = Vec::new();
        let mut check = |name: &str, result: Result<Outcome, String>| {
            let found = match result {
                Ok(outcome) => differences(case, &expected, &outcome, name == "interpreter"),
                Err(error) => vec![error],
            };
            if !found.is_empty() {
                failures.push(format!("{name}:\n  {}", found.join("\n  ")));
            }
        };
        self.interpreter.place(case);
        check("interpreter", self.interpreter.run_case(case));
        self.translator.place(case);
        check("translator", self.translator.run_case(case));
        // Once more from translations that exist, unless the case wrote over its code.
        self.translator.place(case);
        check("translator, again", self.translator.run_case(case));
        Some(failures)
    }

    /// Takes instructions away while the case still fails.
    fn shrink(&mut self, mut program: Program) -> Program {
        loop {
            let mut smaller = None;
            for index in 0..program.items.len() {
                if matches!(
                    program.items[index],
                    Item::Nothing | Item::EndLoop { .. } | Item::EndCall
                ) {
                    continue;
                }
                let mut less = program.clone();
                let end = match less.items[index] {
                    Item::Loop { end, .. } | Item::Call { end } => Some(end),
                    _ => None,
                };
                less.items[index] = Item::Nothing;
                if let Some(end) = end {
                    less.items[end] = Item::Nothing;
                }
                let fails = less
                    .case()
                    .and_then(|case| self.failures(&case))
                    .is_some_and(|failures| !failures.is_empty());
                if fails {
                    smaller = Some(less);
                    break;
                }
            }
            match smaller {
                Some(less) => program = less,
                None => return program,
            }
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| {
        value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number"))
    })
}

fn oracle(cases: u64) {
    let seed = number("ORACLE_SEED", 1);
    let cases = number("ORACLE_CASES", cases);
    // After this many failures there is enough to read.
    let most = number("ORACLE_FAILURES", 10) as usize;
    // Past the test runner, which would hide it where the test passes.
    let _ = writeln!(std::io::stderr(), "ORACLE_SEED={seed} ORACLE_CASES={cases}");
    let mut machines = Machines::new();
    let mut generator = Generator::new(&mut machines.interpreter);
    // Every kind of instruction alone some times, then mixtures.
    let alone = (generator.codes() as u64 * 3).min(cases / 2);
    let (mut passed, mut failed, mut undecided) = (0, 0, 0);
    for number in 0..cases {
        let own = seed.wrapping_mul(0x1_0000_0001).wrapping_add(number);
        let code = (number < alone).then(|| (number.wrapping_add(seed - 1)) as usize);
        let program = generator.program(own, code);
        let case = program.case().expect("the generator returns what assembles");
        match machines.failures(&case) {
            None => undecided += 1,
            Some(failures) if failures.is_empty() => passed += 1,
            Some(_) => {
                let small = machines.shrink(program);
                let case = small.case().expect("a shrunk case assembles");
                let failures = machines.failures(&case).unwrap_or_default();
                println!("--- case {number}\n{}{}\n", describe(&case), failures.join("\n"));
                failed += 1;
                if failed >= most {
                    break;
                }
            }
        }
    }
    println!("{passed} passed, {undecided} undecided, {failed} failed");
    assert_eq!(failed, 0, "ORACLE_SEED={seed}: see the cases above");
    assert!(undecided * 100 <= cases, "{undecided} cases without a native result");
}

#[test]
fn oracle_short() {
    oracle(20_000);
}

#[test]
#[ignore = "takes minutes; run it after a change of the translator or the interpreter"]
fn oracle_long() {
    oracle(1_000_000);
}
