//! The contract, proved by one body for each engine.
//!
//! Engine `kvm` needs a /dev/kvm. Without one its tests are listed as ignored,
//! with the reason; with REQUIRE_KVM=1 they fail. (The harness is not the
//! standard one because that cannot skip at run time.)

mod debug;
mod dirty;
mod doorbells;
mod exits;
mod guest;
mod interrupts;
mod irqfds;
mod saved;
mod time;

use guest::Engine;
use libtest_mimic::{Arguments, Failed, Trial};

type Body = fn(Engine);

fn main() {
    let arguments = Arguments::from_args();
    let bodies: Vec<(&str, Body)> = [
        debug::BODIES,
        dirty::BODIES,
        doorbells::BODIES,
        exits::BODIES,
        interrupts::BODIES,
        irqfds::BODIES,
        saved::BODIES,
        time::BODIES,
    ]
    .into_iter()
    .flatten()
    .copied()
    .collect();
    let kvm = tetrarch_engine_kvm::available().map_err(|reason| reason.to_string());
    let required = std::env::var("REQUIRE_KVM").as_deref() == Ok("1");
    if let Err(reason) = &kvm
        && !required
    {
        eprintln!("ignored: all of engine kvm: {reason}");
    }
    let mut trials = Vec::new();
    for engine in Engine::ALL {
        let needs_kvm = engine == Engine::Kvm;
        for &(name, body) in &bodies {
            let reason = kvm.as_ref().err().filter(|_| needs_kvm).cloned();
            let ignored = reason.is_some() && !required;
            let run = move || match &reason {
                Some(reason) => Err(Failed::from(reason.as_str())),
                None => {
                    body(engine);
                    Ok(())
                }
            };
            trials.push(Trial::test(format!("{engine:?}::{name}"), run).with_ignored_flag(ignored));
        }
    }
    // One engine's state taken up by the other.
    for (from, to) in [(Engine::Bt, Engine::Kvm), (Engine::Kvm, Engine::Bt)] {
        for &(name, body) in saved::BETWEEN {
            let reason = kvm.as_ref().err().cloned();
            let ignored = reason.is_some() && !required;
            let run = move || match &reason {
                Some(reason) => Err(Failed::from(reason.as_str())),
                None => {
                    body(from, to);
                    Ok(())
                }
            };
            let name = format!("{from:?}_to_{to:?}::{name}");
            trials.push(Trial::test(name, run).with_ignored_flag(ignored));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
