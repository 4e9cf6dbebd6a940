//! What of drives goes into a saved machine, as numbers.

use crate::ata::{Drive, DriveState, Medium};
use crate::scsi::{self, Cd, Sense, Unit};

/// A saved controller is none.
#[derive(Debug, thiserror::Error)]
#[error("a saved controller is damaged, or of another")]
pub struct DamagedState;

pub fn sense(sense: Sense) -> u64 {
    u64::from(sense.key) << 16 | u64::from(sense.code) << 8 | u64::from(sense.qualifier)
}

pub fn sense_of(word: u64) -> Sense {
    Sense { key: (word >> 16) as u8 & 0xF, code: (word >> 8) as u8, qualifier: word as u8 }
}

/// What commands have changed of a drive: five numbers, and for a CD five more.
pub fn save_drive(drive: &Drive) -> Vec<u64> {
    let DriveState { write_cache, multiple, mode, heads, sectors } = drive.state;
    let mut saved =
        vec![write_cache.into(), multiple.into(), mode.into(), heads.into(), sectors.into()];
    if let Medium::Cd(cd) = &drive.medium {
        saved.extend(save_cd(cd));
    }
    saved
}

fn save_attention(attention: Option<Sense>) -> u64 {
    attention.map_or(0, |attention| 1 << 24 | sense(attention))
}

fn attention_of(word: u64) -> Option<Sense> {
    (word >> 24 != 0).then(|| sense_of(word))
}

fn save_cd(cd: &Cd) -> [u64; 5] {
    let attention = save_attention(cd.attention);
    [sense(cd.sense), attention, cd.open.into(), cd.locked.into(), cd.event.into()]
}

fn load_cd(cd: &mut Cd, [last, attention, open, locked, event]: [u64; 5]) {
    (cd.sense, cd.attention) = (sense_of(last), attention_of(attention));
    (cd.open, cd.locked, cd.event) = (open != 0, locked != 0, event as u8);
}

/// The same of a SCSI unit: two numbers, and for a CD five.
pub fn save_unit(unit: &Unit) -> Vec<u64> {
    match &unit.drive {
        scsi::Drive::Disk(disk) => vec![save_attention(disk.attention), disk.stopped.into()],
        scsi::Drive::Cd(cd) => save_cd(cd).to_vec(),
    }
}

pub fn load_unit(unit: &mut Unit, saved: &[u64]) -> Result<(), DamagedState> {
    match (&mut unit.drive, saved) {
        (scsi::Drive::Disk(disk), &[attention, stopped]) => {
            (disk.attention, disk.stopped) = (attention_of(attention), stopped != 0);
        }
        (scsi::Drive::Cd(cd), &[last, attention, open, locked, event]) => {
            load_cd(cd, [last, attention, open, locked, event]);
        }
        _ => return Err(DamagedState),
    }
    Ok(())
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
            load_cd(cd, [last, attention, open, locked, event]);
            Ok(())
        }
        _ => Err(DamagedState),
    }
}
