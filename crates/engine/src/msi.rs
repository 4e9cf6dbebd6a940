//! Message-signalled interrupts, and lines that stand for one.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::{EngineError, GSI_COUNT};

/// Lines above the I/O APIC's pins. A kernel's table of routes has 4096 entries, the
/// pins' among them (linux/kvm_host.h, KVM_MAX_IRQ_ROUTES).
pub const MSI_GSIS: Range<u32> = GSI_COUNT..4048;

/// A write that a device makes instead of driving a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    pub address: u64,
    pub data: u32,
}

impl Msi {
    /// Whether the write goes to local APICs; others are lost (Intel SDM 3A, 11.11.1).
    pub fn is_interrupt(&self) -> bool {
        self.address >> 20 == 0xFEE
    }
}

/// The messages of one VM's lines.
#[derive(Clone, Default)]
pub struct MsiRoutes(BTreeMap<u32, Msi>);

impl MsiRoutes {
    pub fn get(&self, gsi: u32) -> Option<Msi> {
        self.0.get(&gsi).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u32, Msi)> + '_ {
        self.0.iter().map(|(&gsi, &msi)| (gsi, msi))
    }

    /// With these routes set, or taken away; on an error none is.
    pub fn changed(&self, changes: &[(u32, Option<Msi>)]) -> Result<Self, EngineError> {
        if let Some((gsi, _)) = changes.iter().find(|(gsi, _)| !MSI_GSIS.contains(gsi)) {
            let Range { start, end } = MSI_GSIS;
            let what = if *gsi < start {
                format!("line {gsi} is a pin of the I/O APIC and stands for no message")
            } else {
                format!("there is no line {gsi}")
            };
            let mend = format!("give a line of {start} to {}", end - 1);
            return Err(EngineError::Refused(what).mended_by(mend));
        }
        let mut routes = self.clone();
        for &(gsi, msi) in changes {
            match msi {
                Some(msi) => routes.0.insert(gsi, msi),
                None => routes.0.remove(&gsi),
            };
        }
        Ok(routes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_all_made_or_none() {
        let msi = |data| Some(Msi { address: 0xFEE0_0000, data });
        let routes = MsiRoutes::default().changed(&[(24, msi(1)), (25, msi(2))]).unwrap();
        for (gsi, cause) in [(23, "a pin of the I/O APIC"), (4048, "no line 4048")] {
            let error = routes.changed(&[(24, None), (gsi, msi(3))]).err().unwrap().to_string();
            assert!(error.contains(cause) && error.contains("24 to 4047"), "{error}");
        }
        let routes = routes.changed(&[(24, None), (26, None), (25, msi(4))]).unwrap();
        assert_eq!(routes.iter().collect::<Vec<_>>(), [(25, msi(4).unwrap())]);
    }
}
