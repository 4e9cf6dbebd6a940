//! The host CPU as the oracle: random programs run natively, interpreted and
//! translated must end alike.
//!
//! `ORACLE_SEED`, `ORACLE_CASES` and `ORACLE_FIRST` choose which, up to which number, and from
//! which on.

mod support;

use std::collections::BTreeMap;
use std::io::Write as _;

use support::case::{
    ARITH, CODE, Case, DATA, DATA_BYTES, Fault, HOLE, Outcome, PAGE, State, describe, differences,
};
use support::generate::{Generator, Item, Program};
use support::guest::Guest;
use support::host_cpu::HostCpu;
use support::model::{GP, PF, fault_is_open, left_out};

/// What came out of a case.
enum Verdict {
    /// The host CPU gave no result in time.
    Undecided,
    /// It gave one that says nothing of a guest, and why.
    LeftOut(&'static str),
    /// All ended alike; `reached`: at the end of the program.
    Same { reached: bool },
    /// One entry for each engine.
    Differs(Vec<String>),
}

struct Machines {
    native: HostCpu,
    interpreter: Guest,
    translator: Guest,
}

impl Machines {
    fn new() -> Option<Self> {
        // The child first: it is best made while the process has few threads.
        let native = HostCpu::new()?;
        let (interpreter, translator) = (Guest::for_cases(false), Guest::for_cases(true));
        Some(Self { native, interpreter, translator })
    }

    fn judge(&mut self, case: &Case) -> Verdict {
        let Some(expected) = self.native.run(case) else { return Verdict::Undecided };
        if let Some(why) = left_out(case, &expected) {
            return Verdict::LeftOut(why);
        }
        let reached = expected.state.rip == case.start.rip + case.code.len() as u64 - 2;
        let mut failures = Vec::new();
        let mut check = |name: &str, result: Result<Outcome, String>| {
            let found = match result {
                Ok(outcome) if fault_is_open(case, &expected, &outcome) => Vec::new(),
                Ok(outcome) => differences(case, &expected, &outcome),
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
        if failures.is_empty() { Verdict::Same { reached } } else { Verdict::Differs(failures) }
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
                    .is_some_and(|case| matches!(self.judge(&case), Verdict::Differs(_)));
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
    let Some(mut machines) = Machines::new() else { return };
    let mut generator = Generator::new(&mut machines.interpreter);
    // Every kind of instruction alone some times, then mixtures.
    let alone = (generator.codes() as u64 * 3).min(cases / 2);
    let (mut same, mut ended, mut failed, mut undecided) = (0, 0, 0, 0);
    let mut left_out: BTreeMap<&str, u64> = BTreeMap::new();
    for number in self::number("ORACLE_FIRST", 0)..cases {
        let own = seed.wrapping_mul(0x1_0000_0001).wrapping_add(number);
        let code = (number < alone).then(|| (number.wrapping_add(seed - 1)) as usize);
        let program = generator.program(own, code);
        let case = program.case().expect("the generator returns what assembles");
        match machines.judge(&case) {
            Verdict::Undecided => undecided += 1,
            Verdict::LeftOut(why) => *left_out.entry(why).or_default() += 1,
            Verdict::Same { reached } => {
                same += 1;
                ended += u64::from(reached);
            }
            Verdict::Differs(_) => {
                let small = machines.shrink(program);
                let case = small.case().expect("a shrunk case assembles");
                let failures = match machines.judge(&case) {
                    Verdict::Differs(failures) => failures,
                    _ => vec!["not again".into()],
                };
                println!("--- case {number}\n{}{}\n", describe(&case), failures.join("\n"));
                failed += 1;
                if failed >= most {
                    break;
                }
            }
        }
    }
    let out: u64 = left_out.values().sum();
    let _ = writeln!(
        std::io::stderr(),
        "{same} the same, {ended} of them to their end; {failed} differ, {undecided} undecided, \
         {out} left out: {left_out:?}"
    );
    assert_eq!(failed, 0, "ORACLE_SEED={seed}: see the cases above");
    assert!(undecided * 100 <= cases, "{undecided} cases without a native result");
    assert!(out * 50 <= cases, "{out} cases left out");
    // So that programs which fault at once do not pass for tests of what follows.
    assert!(ended * 2 >= cases, "{ended} of {cases} cases ran to their end");
}

#[test]
fn oracle_short() {
    oracle(20_000);
}

#[test]
#[ignore = "takes minutes; run it after a change of the translator or the interpreter"]
fn oracle_long() {
    oracle(10_000_000);
}

/// CMPS reads two operands, and CPU models differ in which one's fault comes first.
#[test]
fn faults_of_one_instruction_have_no_order() {
    let mut start = State { rip: CODE, data: vec![0; DATA_BYTES], ..State::default() };
    let hole = DATA + HOLE * PAGE;
    (start.gpr[6], start.gpr[7]) = (1 << 63, hole);
    let case = Case::of_one(vec![0xA7, 0x0F, 0x0B], start.clone(), false, ARITH);
    let ends =
        |vector, error, cr2| Outcome { state: start.clone(), fault: Fault { vector, error, cr2 } };
    let (wild, absent) = (ends(GP, 0, 0), ends(PF, 4, hole));
    assert!(differences(&case, &wild, &absent).is_empty());
    assert!(differences(&case, &absent, &wild).is_empty());
    for other in [ends(GP, 8, 0), ends(PF, 6, hole), ends(PF, 4, hole + 8), ends(6, 0, 0)] {
        assert!(!differences(&case, &absent, &other).is_empty(), "{:x?}", other.fault);
    }
}
