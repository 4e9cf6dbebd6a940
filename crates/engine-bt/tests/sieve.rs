//! The opcode sieve: every opcode of every map, run by user code on the host CPU,
//! interpreted and translated. Each that the host runs, the guest runs, and the
//! other way round, unless CPUID tells the guest otherwise.
//!
//! The oracle (`oracle.rs`) makes instructions from what CPUID reports, so it never
//! meets one that is nobody's feature: a hint, or an encoding that must be refused.
//! Here nothing is left out but what [`left_out`] names.

mod support;

use std::collections::BTreeMap;
use std::io::Write as _;

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};
use support::case::differences;
use support::case::{ARITH, CODE, Case, DATA, DATA_BYTES, DATA_HIGH, Fpu, Outcome, State};
use support::encodings::{Map, forms, heads};
use support::features::{Bits, Policy, features};
use support::guest::{CS0, Guest};
use support::host_cpu::HostCpu;
use support::model::{GP, UD, sieve_accepts, undefined};
use support::random::Random;

/// Registers with which as much as possible runs: pointers to zeros, whose low
/// halves are null selectors, and counts that are small. With EDX 1 WRPKRU is
/// #GP, and XRSTOR restores nothing.
fn start() -> State {
    let mut gpr: [u64; 16] = std::array::from_fn(|number| number as u64 * 4);
    gpr[..8].copy_from_slice(&[0, 3, 1, DATA, DATA + 0x800, DATA + 0x800, DATA_HIGH, DATA]);
    State { gpr, rip: CODE + 0x100, rflags: 0x202, fpu: Fpu::default(), data: vec![0; DATA_BYTES] }
}

/// Encodings that are not run at all: with them user code leaves for an operating
/// system or a hypervisor, and each has its own.
fn left_out(map: Map, code: &[u8], i: &Instruction) -> bool {
    // VMCALL, VMMCALL and what the same ModRM means with other prefixes.
    let hypervisor = code.windows(3).any(|w| matches!(w, [0x0F, 0x01, 0xC1 | 0xD9]));
    hypervisor && map == Map::Escaped
        || matches!(
            i.mnemonic(),
            Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Syscall | Mnemonic::Sysenter
        )
}

/// Instructions whose result is the machine's own: only whether they fault counts.
/// Of those under UMIP, which the host's kernel may have switched on, not even
/// that: Linux emulates some of them (arch/x86/kernel/umip.c).
fn own_result(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdrand
            | M::Rdseed
            | M::Xgetbv
            | M::Rdfsbase
            | M::Rdgsbase
    ) || umip(i)
}

fn umip(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw)
}

/// Encodings that the decoder does not know, and the bit that announces them.
fn unknown(map: Map) -> Option<CpuidFeature> {
    // Whatever AVX-512 and APX have added.
    (map == Map::Evex).then_some(CpuidFeature::AVX512F)
}

struct Sieve {
    native: HostCpu,
    interpreter: Guest,
    translator: Guest,
    host: Bits,
    guest: Bits,
    options: u32,
    code32: bool,
    /// Failures by instruction: how often, and an example.
    failures: BTreeMap<String, (u64, String)>,
    run: u64,
    ran: u64,
    explained: BTreeMap<String, u64>,
    lost: u64,
}

impl Sieve {
    fn new(code32: bool) -> Option<Self> {
        let native = HostCpu::new()?;
        let mut interpreter = Guest::for_cases(false);
        let guest = Bits::of_guest(&mut interpreter);
        let amd = is_amd(&mut interpreter);
        Some(Self {
            native,
            interpreter,
            translator: Guest::for_cases(true),
            host: Bits::of_host(),
            guest,
            options: if amd { DecoderOptions::AMD } else { DecoderOptions::NONE },
            code32,
            failures: BTreeMap::new(),
            run: 0,
            ran: 0,
            explained: BTreeMap::new(),
            lost: 0,
        })
    }

    /// The feature by which CPUID explains that only one of the two runs it.
    fn explained(&self, map: Map, i: &Instruction, guest_runs: bool) -> Option<CpuidFeature> {
        let all = i.cpuid_features().iter().copied().chain(unknown(map)).map(|feature| {
            // Of XTEST: one hides with the other.
            if feature == CpuidFeature::HLE_or_RTM { CpuidFeature::RTM } else { feature }
        });
        let mut all = all.filter(|&feature| self.guest.get(feature).is_some());
        if guest_runs {
            all.find(|&feature| self.guest.has(feature) && !self.host.has(feature))
        } else {
            // A hypervisor below the host may hide a bit too, and cannot make the
            // CPU refuse the instruction.
            all.find(|&feature| !self.guest.has(feature))
        }
    }

    fn try_one(&mut self, map: Map, code: Vec<u8>) {
        let mut bytes = code.clone();
        bytes.resize(15, 0xCC);
        let bits = if self.code32 { 32 } else { 64 };
        let i = Decoder::with_ip(bits, &bytes, CODE + 0x100, self.options).decode();
        if left_out(map, &code, &i) {
            return;
        }
        let case = Case {
            gathers: i.is_vsib(),
            code32: self.code32,
            ..Case::of_one(code, start(), false, ARITH & !undefined(&i))
        };
        let Some(host) = self.native.run(&case) else {
            self.lost += 1;
            return;
        };
        self.run += 1;
        self.ran += u64::from(host.fault.vector != UD);
        for tier in ["interpreter", "translator"] {
            let guest =
                if tier == "interpreter" { &mut self.interpreter } else { &mut self.translator };
            guest.place(&case);
            let text = match guest.run_case(&case) {
                Err(error) => error,
                Ok(guest) => match self.judge(map, &i, &case, &host, &guest) {
                    None => continue,
                    Some(text) => text,
                },
            };
            let key = format!("{tier}: {:?} {:?}", i.code(), i.cpuid_features());
            let entry = self.failures.entry(key).or_insert((0, String::new()));
            entry.0 += 1;
            if entry.0 == 1 {
                entry.1 = format!("{:02x?}: {text}", case.code);
            }
        }
    }

    fn judge(
        &mut self,
        map: Map,
        i: &Instruction,
        case: &Case,
        host: &Outcome,
        guest: &Outcome,
    ) -> Option<String> {
        let (host_runs, guest_runs) = (host.fault.vector != UD, guest.fault.vector != UD);
        if host_runs != guest_runs
            && let Some(feature) = self.explained(map, i, guest_runs)
        {
            *self.explained.entry(format!("{feature:?}")).or_default() += 1;
            return None;
        }
        if sieve_accepts(i, &case.code, host, guest) || umip(i) && host.fault.vector == GP {
            return None;
        }
        if host_runs != guest_runs {
            let who = |runs| if runs { "runs it" } else { "#UD" };
            return Some(format!("host {}, guest {}", who(host_runs), who(guest_runs)));
        }
        if own_result(i) {
            let same = host.fault.vector == guest.fault.vector && host.state.rip == guest.state.rip;
            return (!same).then(|| format!("host {:x?}, guest {:x?}", host.fault, guest.fault));
        }
        let found = differences(case, host, guest);
        (!found.is_empty()).then(|| found.join("; "))
    }

    /// Runs the opcodes of all maps, with `most` forms of ModRM each: all of them,
    /// or that many drawn.
    fn all(&mut self, seed: u64, most: impl Fn(Map) -> usize) {
        let mut random = Random::new(seed);
        let forms = forms();
        for head in heads(self.code32) {
            let most = most(head.map()).min(forms.len());
            for opcode in 0..=255 {
                for index in 0..most {
                    let form = if most < forms.len() { random.pick(&forms) } else { forms[index] };
                    if let Some(code) = head.encode(opcode, form) {
                        self.try_one(head.map(), code);
                    }
                }
            }
        }
    }

    fn conclude(&self) {
        let explained: u64 = self.explained.values().sum();
        let _ = writeln!(
            std::io::stderr(),
            "sieve: {} encodings, {} run by the host, {explained} hidden by CPUID, {} without an end",
            self.run,
            self.ran,
            self.lost
        );
        for (feature, count) in &self.explained {
            println!("{feature} explains {count}");
        }
        for (what, (count, example)) in &self.failures {
            println!("{what}, {count} times; {example}");
        }
        assert!(self.failures.is_empty(), "{} kinds of instructions differ", self.failures.len());
        assert!(self.lost * 1000 <= self.run, "{} encodings without an end", self.lost);
        // So that a sieve that runs nothing does not pass.
        assert!(self.ran * 50 >= self.run, "the host ran {} of {}", self.ran, self.run);
    }
}

fn is_amd(guest: &mut Guest) -> bool {
    guest.cpuid(0, 0)[2] != u32::from_le_bytes(*b"ntel")
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| {
        value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number"))
    })
}

fn short(code32: bool) {
    let seed = number("SIEVE_SEED", 1);
    let Some(mut sieve) = Sieve::new(code32) else { return };
    let _ = writeln!(std::io::stderr(), "SIEVE_SEED={seed}");
    sieve.all(seed, |map| match map {
        Map::OneByte | Map::Escaped => 12,
        Map::Vex => 3,
        Map::Evex | Map::Xop => 1,
    });
    sieve.conclude();
}

#[test]
fn sieve_short() {
    short(false);
}

#[test]
fn sieve_short_of_32_bit_code() {
    short(true);
}

#[test]
#[ignore = "takes minutes; run it after a change of what the guest's CPU has"]
fn sieve_whole() {
    whole(false);
}

#[test]
#[ignore = "takes minutes; run it after a change of what the guest's CPU has"]
fn sieve_whole_of_32_bit_code() {
    whole(true);
}

fn whole(code32: bool) {
    let Some(mut sieve) = Sieve::new(code32) else { return };
    sieve.all(1, |map| match map {
        Map::OneByte | Map::Escaped => usize::MAX,
        Map::Vex => 24,
        Map::Evex | Map::Xop => 8,
    });
    sieve.conclude();
}

/// The guest's CPUID follows the table of `support/features.rs`, bit by bit.
#[test]
fn cpuid_bits_follow_the_policy() {
    let host = Bits::of_host();
    let guest = Bits::of_guest(&mut Guest::for_cases(false));
    for feature in features() {
        let name = feature.feature;
        let expected = match feature.policy {
            Policy::Host => host.has(name),
            Policy::Software => true,
            Policy::Hidden(_) => false,
        };
        assert_eq!(guest.has(name), expected, "{name:?} {:x?}", feature.bit);
    }
}

/// A program unwinding its stack asks whether there is a shadow stack by what is a
/// hint without one.
#[test]
fn rdssp_leaves_its_register() {
    for code in [vec![0xF3, 0x0F, 0x1E, 0xC8], vec![0xF3, 0x48, 0x0F, 0x1E, 0xC8]] {
        let mut i = Decoder::new(64, &code, DecoderOptions::NONE);
        assert!(matches!(i.decode().code(), Code::Rdsspd_r32 | Code::Rdsspq_r64));
        let state = start();
        let case = Case::of_one(code, state.clone(), false, ARITH);
        for translate in [false, true] {
            let mut guest = Guest::for_cases(translate);
            guest.place(&case);
            let end = guest.run_case(&case).unwrap();
            assert_eq!((end.fault.vector, end.state.gpr), (3, state.gpr), "{:02x?}", case.code);
        }
    }
}

/// JMP m16:32 with REX.W reads m16:64 on Intel, and AMD ignores the prefix (AMD
/// APM 3, "JMP (Far)").
#[test]
fn far_jumps_read_what_the_vendor_reads() {
    const TARGET: u64 = CODE + 0x180;
    let mut state = start();
    for translate in [false, true] {
        let mut guest = Guest::for_cases(translate);
        let amd = is_amd(&mut guest);
        let (size, other) = if amd { (4, 8) } else { (8, 4) };
        state.data[..8].copy_from_slice(&TARGET.to_le_bytes());
        for at in [size, other] {
            state.data[4..10].fill(0);
            state.data[at..at + 2].copy_from_slice(&CS0.to_le_bytes());
            let case = Case::of_one(vec![0x48, 0xFF, 0x2F], state.clone(), true, 0);
            guest.place(&case);
            let end = guest.run_case(&case).unwrap();
            // INT3 at the target, or #GP(0) of a null selector.
            let expected = if at == size { (3, TARGET + 1) } else { (GP, state.rip) };
            assert_eq!((end.fault.vector, end.state.rip), expected, "selector at {at}, AMD: {amd}");
        }
    }
}

/// docs/cpu.md has the table of what is hidden, with the reasons of this policy.
#[test]
fn the_document_names_what_is_hidden() {
    let mut reasons: Vec<&str> = Vec::new();
    let mut names: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for feature in features() {
        if let Policy::Hidden(why) = feature.policy {
            if !reasons.contains(&why) {
                reasons.push(why);
            }
            names.entry(why).or_default().push(format!("{:?}", feature.feature));
        }
    }
    let rows: String =
        reasons.iter().map(|why| format!("| {} | {why} |\n", names[why].join(", "))).collect();
    let document = include_str!("../../../docs/cpu.md");
    assert!(document.contains(&rows), "docs/cpu.md should have:\n{rows}");
}
