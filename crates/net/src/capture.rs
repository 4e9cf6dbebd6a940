//! Frames into a file that Wireshark opens: the classic form, with nanoseconds
//! (draft-ietf-opsawg-pcap, section 4).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::{Frame, Interest, MAX_FRAME, NetBackend, Offloads, Packet, Sent};

const MAGIC_NS: u32 = 0xA1B2_3C4D;
const ETHERNET: u32 = 1;

/// The file, for all queues of a card. After an error nothing more is written.
pub struct CaptureFile(Mutex<Option<BufWriter<File>>>);

impl CaptureFile {
    pub fn new(file: File) -> io::Result<Self> {
        let mut writer = BufWriter::new(file);
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(&MAGIC_NS.to_le_bytes());
        header.extend_from_slice(&2_u16.to_le_bytes());
        header.extend_from_slice(&4_u16.to_le_bytes());
        header.extend_from_slice(&[0; 8]);
        header.extend_from_slice(&(MAX_FRAME as u32).to_le_bytes());
        header.extend_from_slice(&ETHERNET.to_le_bytes());
        writer.write_all(&header)?;
        writer.flush()?;
        Ok(Self(Mutex::new(Some(writer))))
    }

    fn add(&self, frame: &[u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.write(|writer| {
            let mut record = [0; 16];
            record[..4].copy_from_slice(&(now.as_secs() as u32).to_le_bytes());
            record[4..8].copy_from_slice(&now.subsec_nanos().to_le_bytes());
            record[8..12].copy_from_slice(&(frame.len() as u32).to_le_bytes());
            record[12..].copy_from_slice(&(frame.len() as u32).to_le_bytes());
            writer.write_all(&record)?;
            writer.write_all(frame)
        });
    }

    fn flush(&self) {
        self.write(BufWriter::flush);
    }

    fn write(&self, body: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) {
        let mut file = self.0.lock();
        if let Some(writer) = &mut *file
            && let Err(error) = body(writer)
        {
            log::warn!("the capture of frames ends: {error}");
            *file = None;
        }
    }
}

/// Writes down what goes through; as the guest sees it: what was left to the device is not
/// done yet.
pub struct Capture {
    inner: Box<dyn NetBackend>,
    file: Arc<CaptureFile>,
    copy: Vec<u8>,
    /// Frames were written since the file was flushed.
    pending: bool,
}

impl Capture {
    pub fn new(inner: Box<dyn NetBackend>, file: Arc<CaptureFile>) -> Self {
        Self { inner, file, copy: Vec::new(), pending: false }
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.pending) {
            self.file.flush();
        }
    }
}

impl NetBackend for Capture {
    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn watch(&mut self, interest: Interest) {
        self.inner.watch(interest);
    }

    fn work(&mut self) {
        self.inner.work();
    }

    fn offloads(&self) -> Offloads {
        self.inner.offloads()
    }

    fn accept(&mut self, offloads: Offloads) {
        self.inner.accept(offloads);
    }

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if !packet.is_sound() {
            return self.inner.send(packet);
        }
        // What is written down is what was sent, whatever the guest does to it.
        packet.copy_to(&mut self.copy);
        let own = Packet { offload: packet.offload, payload: crate::Payload::Bytes(&self.copy) };
        let sent = self.inner.send(&own);
        if sent == Sent::Taken {
            self.file.add(&self.copy);
            self.pending = true;
        }
        sent
    }

    fn flush(&mut self) {
        self.inner.flush();
        self.settle();
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let came = self.inner.receive(frame);
        if came {
            self.file.add(frame.bytes());
            self.pending = true;
        } else {
            self.settle();
        }
        came
    }

    fn enable(&mut self, on: bool) {
        self.inner.enable(on);
    }

    fn link(&self) -> bool {
        self.inner.link()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loopback, numbered};

    #[test]
    fn file_is_the_classic_form_and_whole_after_each_batch() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let capture = CaptureFile::new(file.reopen().unwrap()).unwrap();
        let mut link = Capture::new(Box::new(Loopback::default()), Arc::new(capture));
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32;
        assert_eq!(link.send(&Packet::plain(&numbered(1))), Sent::Taken);
        assert_eq!(link.send(&Packet::plain(&[0; 3])), Sent::Taken);
        link.flush();
        let word =
            |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len(), 24 + 16 + 60, "what is no frame is not in it");
        assert_eq!((word(&bytes, 0), word(&bytes, 20)), (0xA1B2_3C4D, 1));
        assert_eq!(bytes[4..8], [2, 0, 4, 0]);
        assert!((before..before + 60).contains(&word(&bytes, 24)));
        assert!(word(&bytes, 28) < 1_000_000_000);
        assert_eq!((word(&bytes, 32), word(&bytes, 36)), (60, 60));
        assert_eq!(bytes[40..], numbered(1));
        let mut frame = Frame::default();
        while link.receive(&mut frame) {}
        assert_eq!(std::fs::read(file.path()).unwrap().len(), 24 + 2 * 76 + 19);
    }

    #[test]
    fn disk_that_is_full_ends_the_capture_and_nothing_else() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(CaptureFile::new(full.try_clone().unwrap()).is_err());
        let capture = CaptureFile(Mutex::new(Some(BufWriter::new(full))));
        let mut link = Capture::new(Box::new(Loopback::default()), Arc::new(capture));
        for number in 0..3 {
            assert_eq!(link.send(&Packet::plain(&numbered(number))), Sent::Taken);
            link.flush();
        }
        let mut frame = Frame::default();
        let came = std::iter::from_fn(|| link.receive(&mut frame).then_some(())).count();
        assert_eq!(came, 3);
        assert!(link.file.0.lock().is_none());
    }
}
