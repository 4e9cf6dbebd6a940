//! A capture of all frames: the classic form of libpcap, with nanoseconds, which Wireshark
//! and tcpdump open (draft-ietf-opsawg-pcap).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Frame, MAX_FRAME, NetBackend, Offload, Offloads, SendError};

const MAGIC_NANOSECONDS: u32 = 0xA1B2_3C4D;
const ETHERNET: u32 = 1;

/// A network whose frames are written to a file, as they pass the card.
pub struct Capture {
    inner: Box<dyn NetBackend>,
    file: BufWriter<File>,
    failed: bool,
}

impl Capture {
    pub fn new(inner: Box<dyn NetBackend>, file: File) -> io::Result<Self> {
        let mut file = BufWriter::new(file);
        let mut header = Vec::new();
        header.extend(MAGIC_NANOSECONDS.to_le_bytes());
        header.extend(2_u16.to_le_bytes());
        header.extend(4_u16.to_le_bytes());
        header.extend([0; 8]);
        header.extend((MAX_FRAME as u32).to_le_bytes());
        header.extend(ETHERNET.to_le_bytes());
        file.write_all(&header)?;
        file.flush()?;
        Ok(Self { inner, file, failed: false })
    }

    /// A full disk ends the capture, and nothing else.
    fn note(&mut self, data: &[u8]) {
        if self.failed {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = (data.len() as u32).to_le_bytes();
        let mut record = [0; 16];
        record[..4].copy_from_slice(&(now.as_secs() as u32).to_le_bytes());
        record[4..8].copy_from_slice(&now.subsec_nanos().to_le_bytes());
        record[8..12].copy_from_slice(&length);
        record[12..].copy_from_slice(&length);
        let written = self.file.write_all(&record).and_then(|()| self.file.write_all(data));
        // A reader that follows the file sees whole frames.
        if let Err(error) = written.and_then(|()| self.file.flush()) {
            log::warn!("the capture of a network ends here: {error}");
            self.failed = true;
        }
    }
}

impl NetBackend for Capture {
    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        let got = self.inner.receive(frame)?;
        if got {
            self.note(&frame.data);
        }
        Ok(got)
    }

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError> {
        let sent = self.inner.send(offload, data);
        if !matches!(sent, Err(SendError::Full)) {
            self.note(data);
        }
        sent
    }

    fn want_room(&mut self, wanted: bool) {
        self.inner.want_room(wanted);
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn accept(&mut self, offloads: Offloads) -> io::Result<()> {
        self.inner.accept(offloads)
    }

    fn tick(&mut self) {
        self.inner.tick();
    }

    fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.inner.timer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, scratch};

    #[test]
    fn file_has_each_frame_of_both_ways() {
        let (file, path) = scratch();
        let mut net = Capture::new(Box::new(Loop::new()), file).unwrap();
        net.send(&Offload::default(), b"there").unwrap();
        let mut frame = Frame::default();
        assert!(net.receive(&mut frame).unwrap());
        assert!(!net.receive(&mut frame).unwrap());
        let data = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(data[..4], MAGIC_NANOSECONDS.to_le_bytes());
        assert_eq!(data.len(), 24 + 2 * (16 + 5));
        assert_eq!(&data[24 + 16..24 + 21], b"there");
        assert_eq!(&data[24 + 21 + 16..], b"there");
    }
}
