#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tetrarch_fuzz::harness::smp(data));
