//! Identify: what the controller and its namespace are (5.15).

use tetrarch_block::BlockInfo;

use super::events::MAX_REQUESTS;
use super::features::WARM;
use super::log_page::ERROR_ENTRIES;
use super::status::Status;
use super::{ALL_NAMESPACES, MAX_TRANSFER_SHIFT, NAMESPACE};

/// Bytes of every structure.
pub const BYTES: u64 = 4096;
/// VS (3.1.2).
const VERSION: u32 = 0x0001_0400;
pub const FIRMWARE: &[u8; 8] = b"1.0     ";
/// Hosts' disks and file systems have blocks of this size, whatever they show.
const PHYSICAL: u64 = 4096;

/// Who a controller is.
pub struct About {
    /// PCI vendor, of the device and of its subsystem.
    pub vendor: u16,
    pub model: String,
    pub serial: String,
    /// Of the namespace, and in the subsystem's name.
    pub uuid: [u8; 16],
}

impl About {
    /// The structure that Identify asks for by its word 10 (CNS).
    pub fn identify(&self, cns: u8, namespace: u32, info: &BlockInfo) -> Result<Vec<u8>, Status> {
        match (cns, namespace) {
            (0x00, NAMESPACE | ALL_NAMESPACES) => Ok(namespace_data(info)),
            (0x01, _) => Ok(self.controller()),
            // The namespaces behind the one that is given.
            (0x02, 0xFFFF_FFFE..) => Err(Status::INVALID_NAMESPACE),
            (0x02, _) => {
                let mut list = page();
                if namespace < NAMESPACE {
                    put(&mut list, 0, &NAMESPACE.to_le_bytes());
                }
                Ok(list)
            }
            // One descriptor, a UUID, and the end of the list (figure 249).
            (0x03, NAMESPACE) => {
                let mut list = page();
                put(&mut list, 0, &[0x03, 16]);
                put(&mut list, 4, &self.uuid);
                Ok(list)
            }
            (0x00 | 0x03, _) => Err(Status::INVALID_NAMESPACE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Figure 247.
    fn controller(&self) -> Vec<u8> {
        let mut data = page();
        put(&mut data, 0, &self.vendor.to_le_bytes());
        put(&mut data, 2, &self.vendor.to_le_bytes());
        text(&mut data[4..24], &self.serial);
        text(&mut data[24..64], &self.model);
        put(&mut data, 64, FIRMWARE);
        data[77] = MAX_TRANSFER_SHIFT;
        put(&mut data, 80, &VERSION.to_le_bytes());
        put(&mut data, 92, &(1u32 << 8).to_le_bytes()); // OAES: changed namespaces
        data[111] = 1; // an I/O controller
        data[258] = 3; // aborts at once
        data[259] = MAX_REQUESTS as u8 - 1;
        data[260] = 0b11; // one slot of firmware, read-only
        data[261] = 1 << 2; // log pages are read in parts too
        data[262] = ERROR_ENTRIES as u8 - 1;
        put(&mut data, 266, &WARM.to_le_bytes());
        put(&mut data, 268, &(WARM + 10).to_le_bytes());
        data[512] = 0x66; // entries of 64 bytes
        data[513] = 0x44; // and of 16
        put(&mut data, 516, &NAMESPACE.to_le_bytes());
        // Dataset management, write zeroes, values of features other than the current.
        put(&mut data, 520, &(1u16 << 2 | 1 << 3 | 1 << 4).to_le_bytes());
        data[525] = 0b111; // a write cache, flushed for all namespaces at once too
        put(&mut data, 768, self.subsystem().as_bytes());
        put(&mut data, 2048, &2500u16.to_le_bytes()); // the one power state, in 10 mW
        data
    }

    /// The NVM subsystem's name (7.9).
    fn subsystem(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let [a, b, c, d, e] = [0..4, 4..6, 6..8, 8..10, 10..16].map(|part| hex(&self.uuid[part]));
        format!("nqn.2014-08.org.nvmexpress:uuid:{a}-{b}-{c}-{d}-{e}")
    }
}

/// Logical blocks of the namespace, whole ones.
pub fn blocks(info: &BlockInfo) -> u64 {
    info.size / u64::from(info.block_size.max(512))
}

/// Figure 245.
fn namespace_data(info: &BlockInfo) -> Vec<u8> {
    let mut data = page();
    let block = u64::from(info.block_size.max(512));
    for at in [0, 8, 16] {
        put(&mut data, at, &blocks(info).to_le_bytes());
    }
    // Thin: a write may find no room. And the sizes below are given.
    data[24] = 1 | 1 << 4;
    // Blocks in which writing and deallocating is done best, less one: NPWG to NOWS.
    let best = |bytes: u64| ((bytes / block).clamp(1, 1 << 16) - 1) as u16;
    let (write, discard) = (best(PHYSICAL), best(info.discard_granularity.into()));
    for (at, value) in [(64, write), (66, write), (68, discard), (70, discard)] {
        put(&mut data, at, &value.to_le_bytes());
    }
    put(&mut data, 48, &info.size.to_le_bytes());
    data[99] = info.readonly.into();
    // The one format of its blocks: no metadata, and the logarithm of their size.
    data[130] = block.ilog2() as u8;
    data
}

fn page() -> Vec<u8> {
    vec![0; BYTES as usize]
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// ASCII, filled up with spaces, cut at the field's end.
fn text(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let ascii = text.bytes().filter(|byte| (0x20..0x7F).contains(byte));
    field.iter_mut().zip(ascii).for_each(|(place, byte)| *place = byte);
}
