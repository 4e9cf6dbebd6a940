//! Frames as any peer takes them: complete, and no longer than its network has them.

use crate::{Checksum, MalformedHeader, Packet, checksum, segment};

/// Does what a packet's sender left to others.
#[derive(Default)]
pub struct Plain {
    whole: Vec<u8>,
    part: Vec<u8>,
}

impl Plain {
    /// Calls `each` with the frames that a packet is.
    pub fn each(
        &mut self,
        packet: &Packet<'_>,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), MalformedHeader> {
        if !packet.is_sound() {
            return Err(MalformedHeader);
        }
        packet.copy_to(&mut self.whole);
        if let Some(segments) = &packet.offload.segments {
            return segment::divide(&self.whole, segments, &mut self.part, each);
        }
        if let Checksum::Partial { start, offset } = packet.offload.checksum {
            checksum::complete(&mut self.whole, start.into(), offset.into());
        }
        each(&self.whole);
        Ok(())
    }
}
