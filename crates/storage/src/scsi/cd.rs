//! The commands of a CD-ROM drive.

use super::sense::Sense;
use super::toc;

/// Bytes of a packet, padded with zeroes where a controller has more of them.
pub const PACKET: usize = 12;
/// Bytes of a block.
const BLOCK: u64 = 2048;

/// What a command gives.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// These bytes, of which the host takes as many as it has room for.
    Data(Vec<u8>),
    Read {
        offset: u64,
        length: u64,
    },
}

/// What a drive remembers between commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cd {
    /// Why the last command failed.
    pub sense: Sense,
    /// What the next command is told first.
    pub attention: Option<Sense>,
    pub open: bool,
    /// The guest has locked the tray.
    pub locked: bool,
    /// What happened to the medium since it was asked: 0 nothing, 2 new, 3 removed.
    pub event: u8,
}

impl Default for Cd {
    fn default() -> Self {
        Self {
            sense: Sense::NONE,
            attention: Some(Sense::RESET),
            open: false,
            locked: false,
            event: 0,
        }
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |sum, &byte| sum << 8 | u32::from(byte))
}

/// At most as many bytes as the host has asked for.
fn cut(mut data: Vec<u8>, allocated: u32) -> Result<Answer, Sense> {
    data.truncate(allocated as usize);
    Ok(if data.is_empty() { Answer::Done } else { Answer::Data(data) })
}

impl Cd {
    pub fn reset(&mut self) {
        *self = Self { open: self.open, ..Self::default() };
    }

    /// A command failed after it had begun.
    pub fn failed(&mut self, sense: Sense) -> Sense {
        self.sense = sense;
        sense
    }

    /// What a packet asks of a disc of so many bytes; what it fails with is kept for
    /// REQUEST SENSE.
    pub fn begin(&mut self, packet: &[u8; PACKET], size: u64) -> Result<Answer, Sense> {
        let blocks = u32::try_from(size / BLOCK).unwrap_or(u32::MAX);
        // INQUIRY, REQUEST SENSE and GET EVENT STATUS NOTIFICATION are told nothing (SAM-4, 5.14).
        let told = !matches!(packet[0], 0x03 | 0x12 | 0x4A);
        let result = match self.attention.take_if(|_| told) {
            Some(attention) => Err(attention),
            None => self.command(packet, blocks),
        };
        if packet[0] != 0x03 {
            self.sense = result.as_ref().err().copied().unwrap_or(Sense::NONE);
        }
        result
    }

    fn command(&mut self, packet: &[u8; PACKET], blocks: u32) -> Result<Answer, Sense> {
        let in_six = u32::from(packet[4]);
        let in_ten = word(&packet[7..9]);
        match packet[0] {
            // TEST UNIT READY.
            0x00 => self.ready(blocks).map(|()| Answer::Done),
            0x03 => {
                let attention = self.attention.take();
                let sense = attention.unwrap_or(std::mem::take(&mut self.sense));
                cut(sense.bytes(), in_six)
            }
            0x12 => inquiry(packet),
            // MODE SENSE (6) and (10).
            0x1A => cut(self.mode_sense(packet[2], true)?, in_six),
            0x5A => cut(self.mode_sense(packet[2], false)?, in_ten),
            // START STOP UNIT.
            0x1B => self.start_stop(packet[4]).map(|()| Answer::Done),
            // PREVENT ALLOW MEDIUM REMOVAL.
            0x1E => {
                self.locked = packet[4] & 1 != 0;
                Ok(Answer::Done)
            }
            // READ CAPACITY.
            0x25 => {
                self.ready(blocks)?;
                let mut data = (blocks - 1).to_be_bytes().to_vec();
                data.extend((BLOCK as u32).to_be_bytes());
                Ok(Answer::Data(data))
            }
            // READ (10) and (12).
            0x28 => self.read(word(&packet[2..6]), in_ten, blocks),
            0xA8 => self.read(word(&packet[2..6]), word(&packet[6..10]), blocks),
            // SEEK.
            0x2B => {
                self.ready(blocks)?;
                let there = word(&packet[2..6]) < blocks;
                if there { Ok(Answer::Done) } else { Err(Sense::OUT_OF_RANGE) }
            }
            0x43 => {
                self.ready(blocks)?;
                cut(toc::read(packet, blocks)?, in_ten)
            }
            0x46 => cut(self.configuration(packet[1] & 3, word(&packet[2..4]), blocks), in_ten),
            0x4A => cut(self.event_status(packet, blocks)?, in_ten),
            0x51 => {
                self.ready(blocks)?;
                cut(disc_information(), in_ten)
            }
            // SET CD SPEED: as fast as it goes.
            0xBB => Ok(Answer::Done),
            // MECHANISM STATUS: one disc, and where it is.
            0xBD => {
                let door = if self.open { 1 << 4 } else { 0 };
                cut(vec![0, door, 0, 0, 0, 0, 0, 0], word(&packet[8..10]))
            }
            _ => Err(Sense::INVALID_COMMAND),
        }
    }

    fn has_medium(&self, blocks: u32) -> bool {
        !self.open && blocks > 0
    }

    fn ready(&self, blocks: u32) -> Result<(), Sense> {
        if self.has_medium(blocks) { Ok(()) } else { Err(Sense::NO_MEDIUM) }
    }

    fn read(&self, first: u32, count: u32, blocks: u32) -> Result<Answer, Sense> {
        self.ready(blocks)?;
        match first.checked_add(count) {
            Some(end) if end <= blocks => {}
            _ => return Err(Sense::OUT_OF_RANGE),
        }
        if count == 0 {
            return Ok(Answer::Done);
        }
        let (offset, length) = (u64::from(first) * BLOCK, u64::from(count) * BLOCK);
        Ok(Answer::Read { offset, length })
    }

    /// Start, stop, load or eject (MMC-5, 6.44); power conditions are all alike.
    fn start_stop(&mut self, operation: u8) -> Result<(), Sense> {
        match operation & 0b11 {
            0b10 if self.locked => Err(Sense::PREVENTED),
            0b10 => {
                if !self.open {
                    (self.open, self.event) = (true, 3);
                }
                Ok(())
            }
            0b11 => {
                if self.open {
                    (self.open, self.event) = (false, 2);
                    self.attention = Some(Sense::MEDIUM_CHANGED);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Pages of parameters (MMC-5, 7; SFF-8020, 10.8.6).
    fn mode_sense(&self, which: u8, short: bool) -> Result<Vec<u8>, Sense> {
        let mut pages = Vec::new();
        let (control, page) = (which >> 6, which & 0x3F);
        if control == 3 {
            return Err(Sense::NOT_SAVED);
        }
        let wanted = |number| page == number || page == 0x3F;
        let mut known = false;
        if wanted(0x01) {
            pages.extend([0x01, 6, 0, 5, 0, 0, 0, 0]); // retries of a read
            known = true;
        }
        if wanted(0x2A) {
            // Reads what there is of CDs; the tray is locked and opened by commands.
            let lock = u8::from(self.locked) << 1;
            pages.extend([0x2A, 18, 0x03, 0, 0, 0, 0b0010_1001 | lock, 0]);
            pages.extend([0x16, 0x00, 0, 2, 2, 0, 0x16, 0x00, 0, 0, 0, 0]);
            known = true;
        }
        if !known {
            return Err(Sense::INVALID_FIELD);
        }
        if control == 1 {
            // Nothing can be changed.
            let mut at = 0;
            while at + 2 <= pages.len() {
                let end = (at + 2 + usize::from(pages[at + 1])).min(pages.len());
                pages[at + 2..end].fill(0);
                at = end;
            }
        }
        let header = if short { 4 } else { 8 };
        let length = header + pages.len();
        let mut data = vec![0; header];
        if short {
            data[0] = (length - 1) as u8;
        } else {
            data[..2].copy_from_slice(&(length as u16 - 2).to_be_bytes());
        }
        data.append(&mut pages);
        Ok(data)
    }

    /// Features and profiles (MMC-5, 6.6): a CD-ROM where there is a disc.
    fn configuration(&self, which: u8, first: u32, blocks: u32) -> Vec<u8> {
        const CD_ROM: [u8; 2] = [0x00, 0x08];
        let medium = self.has_medium(blocks);
        let profile = if medium { CD_ROM } else { [0, 0] };
        let mut data = vec![0; 6];
        data.extend(profile);
        // (feature, whether it is there now, its data)
        let lock = [0b0010_1001, 0, 0, 0];
        let features: [(u16, bool, &[u8]); 6] = [
            (0x0000, true, &[CD_ROM[0], CD_ROM[1], medium.into(), 0]),
            (0x0001, true, &[0, 0, 0, 2, 0b11, 0, 0, 0]), // core, over ATAPI
            (0x0002, true, &[0b10, 0, 0, 0]),             // events are asked for
            (0x0003, true, &lock),
            (0x0010, medium, &[0, 0, 8, 0, 0, 1, 1, 0]), // blocks of 2 KiB are read
            (0x001E, medium, &[0, 0, 0, 0]),
        ];
        for (number, current, body) in features {
            let wanted = match which {
                0 => u32::from(number) >= first,
                1 => u32::from(number) >= first && current,
                _ => u32::from(number) == first,
            };
            if wanted {
                data.extend(number.to_be_bytes());
                // Version 0 or 2, persistent for those that are always there.
                let always = number < 4;
                let version = if number == 1 { 2 << 2 } else { 0 };
                data.push(version | u8::from(always) << 1 | u8::from(current));
                data.push(body.len() as u8);
                data.extend(body);
            }
        }
        let length = data.len() as u32 - 4;
        data[..4].copy_from_slice(&length.to_be_bytes());
        data
    }

    /// What happened to the medium (MMC-5, 6.7), by polling alone.
    fn event_status(&mut self, packet: &[u8], blocks: u32) -> Result<Vec<u8>, Sense> {
        const MEDIA: u8 = 4;
        if packet[1] & 1 == 0 {
            return Err(Sense::INVALID_FIELD);
        }
        if packet[4] & 1 << MEDIA == 0 {
            // No class of those that were asked for.
            return Ok(vec![0, 2, 0x80, 1 << MEDIA]);
        }
        let status = u8::from(self.open) | u8::from(self.has_medium(blocks)) << 1;
        let event = std::mem::take(&mut self.event);
        Ok(vec![0, 6, MEDIA, 1 << MEDIA, event, status, 0, 0])
    }
}

/// SPC-3, 6.4.
fn inquiry(packet: &[u8]) -> Result<Answer, Sense> {
    if packet[1] & 1 != 0 || packet[2] != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    // A CD-ROM, removable, with answers as SPC has them.
    let mut data = vec![5, 0x80, 5, 0x02, 31, 0, 0, 0];
    data.extend(b"TETRARCH");
    data.extend(b"CD-ROM          ");
    data.extend(b"1.0 ");
    cut(data, word(&packet[3..5]))
}

/// READ DISC INFORMATION (MMC-5, 6.22): one session, complete, on a disc that was pressed.
fn disc_information() -> Vec<u8> {
    let mut data = vec![0; 34];
    (data[1], data[2], data[3], data[4], data[5], data[6]) = (32, 0x0E, 1, 1, 1, 1);
    data[7] = 0x20;
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 100 * BLOCK;

    fn drive() -> Cd {
        Cd { attention: None, ..Cd::default() }
    }

    fn ask(cd: &mut Cd, bytes: &[u8]) -> Result<Answer, Sense> {
        let mut packet = [0; PACKET];
        packet[..bytes.len()].copy_from_slice(bytes);
        cd.begin(&packet, SIZE)
    }

    fn data(cd: &mut Cd, bytes: &[u8]) -> Vec<u8> {
        match ask(cd, bytes) {
            Ok(Answer::Data(data)) => data,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn attention_is_told_once_and_sense_is_kept() {
        let mut cd = Cd::default();
        assert_eq!(data(&mut cd, &[0x12, 0, 0, 0, 36])[8..16], *b"TETRARCH");
        assert_eq!(ask(&mut cd, &[0]), Err(Sense::RESET));
        assert_eq!(ask(&mut cd, &[0]), Ok(Answer::Done));
        assert_eq!(ask(&mut cd, &[0xFF]), Err(Sense::INVALID_COMMAND));
        let sense = data(&mut cd, &[3, 0, 0, 0, 18]);
        assert_eq!((sense[2], sense[12]), (5, 0x20));
        let sense = data(&mut cd, &[3, 0, 0, 0, 18]);
        assert_eq!((sense[2], sense[12]), (0, 0), "it is gone");
        let mut cd = Cd::default();
        let sense = data(&mut cd, &[3, 0, 0, 0, 255]);
        assert_eq!((sense.len(), sense[2], sense[12]), (18, 6, 0x29));
        assert_eq!(ask(&mut cd, &[0]), Ok(Answer::Done));
    }

    #[test]
    fn blocks_inside_the_disc_are_read() {
        let mut cd = drive();
        assert_eq!(data(&mut cd, &[0x25])[..], [0, 0, 0, 99, 0, 0, 8, 0]);
        let read = |offset, length| Ok(Answer::Read { offset, length });
        assert_eq!(ask(&mut cd, &[0x28, 0, 0, 0, 0, 98, 0, 0, 2]), read(98 * BLOCK, 2 * BLOCK));
        assert_eq!(ask(&mut cd, &[0xA8, 0, 0, 0, 0, 1, 0, 0, 0, 3]), read(BLOCK, 3 * BLOCK));
        assert_eq!(ask(&mut cd, &[0x28, 0, 0, 0, 0, 98, 0, 0, 0]), Ok(Answer::Done));
        for packet in [
            [0x28, 0, 0, 0, 0, 99, 0, 0, 2, 0, 0, 0],
            [0x28, 0, 255, 255, 255, 255, 0, 0, 2, 0, 0, 0],
            [0xA8, 0, 0, 0, 0, 1, 255, 255, 255, 255, 0, 0],
            [0x2B, 0, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(cd.begin(&packet, SIZE), Err(Sense::OUT_OF_RANGE));
        }
    }

    #[test]
    fn tray_opens_unless_it_is_locked_and_its_events_are_told() {
        let mut cd = drive();
        let events = [0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8];
        assert_eq!(data(&mut cd, &events), [0, 6, 4, 16, 0, 2, 0, 0]);
        ask(&mut cd, &[0x1E, 0, 0, 0, 1]).unwrap();
        assert_eq!(ask(&mut cd, &[0x1B, 0, 0, 0, 2]), Err(Sense::PREVENTED));
        ask(&mut cd, &[0x1E]).unwrap();
        ask(&mut cd, &[0x1B, 0, 0, 0, 2]).unwrap();
        assert_eq!(data(&mut cd, &events), [0, 6, 4, 16, 3, 1, 0, 0]);
        for packet in [[0; 9], [0x25, 0, 0, 0, 0, 0, 0, 0, 0], [0x28, 0, 0, 0, 0, 0, 0, 0, 1]] {
            assert_eq!(ask(&mut cd, &packet), Err(Sense::NO_MEDIUM));
        }
        ask(&mut cd, &[0x1B, 0, 0, 0, 3]).unwrap();
        assert_eq!(ask(&mut cd, &[0]), Err(Sense::MEDIUM_CHANGED));
        assert_eq!(data(&mut cd, &events), [0, 6, 4, 16, 2, 2, 0, 0]);
        assert_eq!(ask(&mut cd, &[0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8]), Err(Sense::INVALID_FIELD));
    }

    #[test]
    fn contents_pages_and_features_say_their_lengths() {
        let mut cd = drive();
        let toc = data(&mut cd, &[0x43, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(toc[..2], [0, 18]);
        assert_eq!(toc[4..12], [0, 0x14, 1, 0, 0, 0, 0, 0]);
        assert_eq!(toc[12..20], [0, 0x14, 0xAA, 0, 0, 0, 0, 100]);
        let by_time = data(&mut cd, &[0x43, 2, 0, 0, 0, 0, 0xAA, 1, 0]);
        assert_eq!(by_time[4..12], [0, 0x14, 0xAA, 0, 0, 0, 3, 25]);
        for format in [1, 2] {
            let toc = data(&mut cd, &[0x43, 2, format, 0, 0, 0, 0, 1, 0]);
            assert_eq!(toc.len(), 2 + usize::from(toc[1]));
            assert_eq!(data(&mut cd, &[0x43, 2, 0, 0, 0, 0, 0, 1, 0, format << 6]), toc);
        }
        assert_eq!(ask(&mut cd, &[0x43, 0, 0, 0, 0, 0, 5, 1, 0]), Err(Sense::INVALID_FIELD));
        let mode = data(&mut cd, &[0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0]);
        assert_eq!(mode.len(), 2 + usize::from(mode[1]));
        let mode = data(&mut cd, &[0x1A, 0, 0x2A, 0, 255]);
        assert_eq!(mode.len(), 1 + usize::from(mode[0]));
        assert_eq!(ask(&mut cd, &[0x1A, 0, 0x07, 0, 255]), Err(Sense::INVALID_FIELD));
        let all = data(&mut cd, &[0x46, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(all.len(), 4 + usize::from(all[3]));
        assert_eq!(all[6..8], [0, 8]);
        let one = data(&mut cd, &[0x46, 2, 0, 0x10, 0, 0, 0, 1, 0]);
        assert_eq!(one[8..12], [0, 0x10, 1, 8]);
        assert_eq!(data(&mut cd, &[0x46, 0, 0, 0, 0, 0, 0, 0, 8]).len(), 8, "cut");
        assert_eq!(ask(&mut cd, &[0x46]), Ok(Answer::Done));
        assert_eq!(data(&mut cd, &[0x51, 0, 0, 0, 0, 0, 0, 0, 64]).len(), 34);
        assert_eq!(data(&mut cd, &[0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8]).len(), 8);
    }

    #[test]
    fn no_packet_does_harm() {
        let mut cd = Cd::default();
        for seed in 0..200_000u32 {
            let mut packet = [0; PACKET];
            let mut state = seed.wrapping_mul(2_654_435_761) | 1;
            for byte in &mut packet {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            packet[0] = seed as u8;
            let size = [0, 100, SIZE, u64::MAX][seed as usize >> 8 & 3];
            if let Ok(Answer::Read { offset, length }) = cd.begin(&packet, size) {
                assert!(offset + length <= size);
            }
        }
    }
}
