//! What of drives goes into a saved machine, as numbers.

use crate::ata::{Drive, DriveState, Medium};
use crate::atapi::Sense;

/// A saved controller is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved controller is damaged, or of another")]
pub struct DamagedState;

fn sense(sense: Sense) -> u64 {
    u64::from(sense.key) << 16 | u64::from(sense.code) << 8 | u64::from(sense.qualifier)
}

fn sense_of(word: u64) -> Sense {
    Sense { key: (word >> 16) as u8 & 0xF, code: (word >> 8) as u8, qualifier: word as u8 }
}

/// What commands have changed of a drive: five numbers, and for a CD five more.
pub fn save_drive(drive: &Drive) -> Vec<u64> {
    let DriveState { write_cache, multiple, mode, heads, sectors } = drive.state;
    let mut saved =
        vec![write_cache.into(), multiple.into(), mode.into(), heads.into(), sectors.into()];
    if let Medium::Cd(cd) = &drive.medium {
        let attention = cd.attention.map_or(0, |attention| 1 << 24 | sense(attention));
        saved.extend([
            sense(cd.sense),
            attention,
            cd.open.into(),
            cd.locked.into(),
            cd.event.into(),
        ]);
    }
    saved
}

pub fn load_drive(drive: &mut Drive, saved: &[u64]) -> Result<(), DamagedState> {
    let (&[write_cache, multiple, mode, heads, sectors], rest) =
        saved.split_first_chunk().ok_or(DamagedState)?;
    drive.state = DriveState {
        write_cache: write_cache != 0,
        multiple: (multiple as u8).min(crate::ata::MULTIPLE),
        mode: mode as u8,
        heads: (heads as u8).max(1),
        sectors: (sectors as u8).max(1),
    };
    match (&mut drive.medium, rest) {
        (Medium::Disk, []) => Ok(()),
        (Medium::Cd(cd), &[last, attention, open, locked, event]) => {
            cd.sense = sense_of(last);
            cd.attention = (attention >> 24 != 0).then(|| sense_of(attention));
            (cd.open, cd.locked, cd.event) = (open != 0, locked != 0, event as u8);
            Ok(())
        }
        _ => Err(DamagedState),
    }
}
