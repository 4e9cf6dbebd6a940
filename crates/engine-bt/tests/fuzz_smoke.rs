//! A short run of every fuzz target: with the inputs that once found something,
//! and with random ones that are the same each time. docs/fuzzing.md has more.

mod harness;

use std::path::Path;

use harness::{Random, TARGETS};

/// Runs `count` random inputs. FUZZ_SEED chooses others.
fn random_inputs(name: &str, count: u64) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a known target");
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for number in 0..count {
        let mut random = Random(seed << 32 ^ number);
        let length = 64 + random.next() as usize % 448;
        let input = random.bytes(length);
        println!("{name}: input {number} of seed {seed}");
        target(&input);
    }
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
    random_inputs("differential", 1000);
}

#[test]
fn irqchip() {
    random_inputs("irqchip", 3000);
}

#[test]
fn state() {
    random_inputs("state", 500);
}
