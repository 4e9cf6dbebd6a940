//! A short run of every fuzz target: with the inputs that once found something,
//! and with random ones that are the same each time. docs/fuzzing.md has more.

mod harness;

use std::collections::BTreeMap;
use std::path::Path;

use harness::{Random, TARGETS};

/// Random inputs that FUZZ_SEED chooses.
fn inputs(name: &str, count: u64) -> impl Iterator<Item = Vec<u8>> {
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    (0..count).map(move |number| {
        let mut random = Random(seed << 32 ^ number);
        let length = 64 + random.next() as usize % 448;
        println!("{name}: input {number} of seed {seed}");
        random.bytes(length)
    })
}

fn random_inputs(name: &str, count: u64) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a known target");
    inputs(name, count).for_each(|input| target(&input));
}

#[test]
fn findings_stay_fixed() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut replayed = 0;
    for entry in std::fs::read_dir(&folder).expect("the corpus is part of the source") {
        let path = entry.expect("a readable folder").path();
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let kind = name.split('-').next().unwrap_or_default();
        let (_, target) = TARGETS
            .iter()
            .find(|(known, _)| *known == kind)
            .unwrap_or_else(|| panic!("{name}: no target {kind}"));
        println!("{name}");
        target(&std::fs::read(&path).expect("a readable file"));
        replayed += 1;
    }
    assert_ne!(replayed, 0);
}

#[test]
fn interpreter() {
    random_inputs("interpreter", 800);
}

#[test]
fn translator() {
    random_inputs("translator", 800);
}

#[test]
fn differential() {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for input in inputs("differential", 1000) {
        *counts.entry(format!("{:?}", harness::differential(&input))).or_default() += 1;
    }
    println!("{counts:?}");
    // So that a run in which nothing was compared does not pass.
    let same = counts.get("Same").copied().unwrap_or(0);
    assert!(same >= 700, "{same} of 1000 guests compared: {counts:?}");
}

#[test]
fn irqchip() {
    random_inputs("irqchip", 3000);
}

#[test]
fn state() {
    random_inputs("state", 500);
}

#[test]
fn saved() {
    random_inputs("saved", 1000);
}

#[test]
fn platform() {
    random_inputs("platform", 800);
}

#[test]
fn smp() {
    random_inputs("smp", 60);
}
