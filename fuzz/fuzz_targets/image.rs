#![no_main]

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::abort;
use std::sync::{Mutex, Once};

/// What the last panic said. Most are caught, and to print them all would take the time.
static SAID: Mutex<String> = Mutex::new(String::new());

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // libFuzzer's hook ends the process at each panic, those too that are caught.
    static HOOK: Once = Once::new();
    let remember = |panic: &std::panic::PanicHookInfo<'_>| {
        if let Ok(mut said) = SAID.lock() {
            *said = panic.to_string();
        }
    };
    HOOK.call_once(|| set_hook(Box::new(remember)));
    if catch_unwind(AssertUnwindSafe(|| tetrarch_fuzz::block_harness::image(data))).is_err() {
        eprintln!("{}", SAID.lock().expect("nothing panics with it"));
        abort();
    }
});
