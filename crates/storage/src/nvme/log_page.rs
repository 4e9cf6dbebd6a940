//! Log pages (5.14.1): errors, health, firmware, changed namespaces.

use super::status::Status;
use super::{ALL_NAMESPACES, NAMESPACE};

pub const ERRORS: u8 = 0x01;
pub const HEALTH: u8 = 0x02;
const FIRMWARE: u8 = 0x03;
pub const CHANGED_NAMESPACES: u8 = 0x04;

/// Entries of the error log, as ELPE says plus one.
pub const ERROR_ENTRIES: usize = 4;

/// Kelvin.
const TEMPERATURE: u16 = 300;

/// A unit of data is a thousand sectors of 512 bytes (figure 196).
const DATA_UNIT: u64 = 512_000;

/// A command that failed (figure 194).
#[derive(Clone, Copy)]
struct Failure {
    queue: u16,
    command: u16,
    status: Status,
    address: u64,
}

/// What has happened since the controller was made; none of it is part of a saved state but
/// the changed namespace.
#[derive(Default)]
pub struct Log {
    failures: u64,
    /// The newest first.
    last: Vec<Failure>,
    bytes_read: u64,
    bytes_written: u64,
    reads: u64,
    writes: u64,
    pub namespace_changed: bool,
}

impl Log {
    pub fn read(&mut self, bytes: u64) {
        self.reads = self.reads.wrapping_add(1);
        self.bytes_read = self.bytes_read.wrapping_add(bytes);
    }

    pub fn wrote(&mut self, bytes: u64) {
        self.writes = self.writes.wrapping_add(1);
        self.bytes_written = self.bytes_written.wrapping_add(bytes);
    }

    pub fn failed(&mut self, queue: u16, command: u16, status: Status, address: u64) {
        self.failures = self.failures.wrapping_add(1);
        self.last.truncate(ERROR_ENTRIES - 1);
        self.last.insert(0, Failure { queue, command, status, address });
    }

    /// A page, whole.
    pub fn page(&mut self, id: u8, keep: bool) -> Result<Vec<u8>, Status> {
        match id {
            ERRORS => Ok(self.errors()),
            HEALTH => Ok(self.health()),
            FIRMWARE => {
                let mut page = vec![0; 512];
                page[0] = 1; // the first slot is in use
                page[8..16].copy_from_slice(super::identify::FIRMWARE);
                Ok(page)
            }
            CHANGED_NAMESPACES => {
                let mut page = vec![0; 4096];
                if self.namespace_changed {
                    page[..4].copy_from_slice(&NAMESPACE.to_le_bytes());
                }
                self.namespace_changed &= keep;
                Ok(page)
            }
            _ => Err(Status::INVALID_LOG_PAGE),
        }
    }

    fn errors(&self) -> Vec<u8> {
        let mut page = vec![0; 64 * ERROR_ENTRIES];
        for (index, failure) in self.last.iter().enumerate() {
            let entry = &mut page[64 * index..][..64];
            entry[..8].copy_from_slice(&self.failures.wrapping_sub(index as u64).to_le_bytes());
            entry[8..10].copy_from_slice(&failure.queue.to_le_bytes());
            entry[10..12].copy_from_slice(&failure.command.to_le_bytes());
            entry[12..14].copy_from_slice(&(failure.status.bits() << 1).to_le_bytes());
            entry[14..16].fill(0xFF); // no one parameter is to blame
            entry[16..24].copy_from_slice(&failure.address.to_le_bytes());
            entry[24..28].copy_from_slice(&NAMESPACE.to_le_bytes());
        }
        page
    }

    fn health(&self) -> Vec<u8> {
        let mut page = vec![0; 512];
        page[1..3].copy_from_slice(&TEMPERATURE.to_le_bytes());
        (page[3], page[4]) = (100, 10); // spare, and its threshold, in percent
        let units = |bytes: u64| bytes.div_ceil(DATA_UNIT);
        for (at, value) in [
            (32, units(self.bytes_read)),
            (48, units(self.bytes_written)),
            (64, self.reads),
            (80, self.writes),
            (176, self.failures),
        ] {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        page
    }
}

/// Whether a page is kept for this namespace identifier: the controller's or ours.
pub fn is_for(namespace: u32) -> bool {
    matches!(namespace, 0 | NAMESPACE | ALL_NAMESPACES)
}
