//! A tap device of the host (Linux, Documentation/networking/tuntap.rst), with what Linux
//! does of a card's work.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::{Frame, MAX_FRAME, NetBackend, Offload, Offloads, SendError};

// linux/if_tun.h
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54D0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54D8;
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;

/// One queue of a tap, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
pub struct Tap {
    queue: OwnedFd,
}

impl Tap {
    pub fn new(queue: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&queue, true)?;
        let size = Offload::BYTES as libc::c_int;
        // SAFETY: the call reads an int, which lives as long as it.
        if unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { queue })
    }
}

impl NetBackend for Tap {
    fn event(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn receive(&mut self, frame: &mut Frame) -> io::Result<bool> {
        let mut header = [0; Offload::BYTES];
        frame.data.resize(MAX_FRAME, 0);
        let parts = &mut [IoSliceMut::new(&mut header), IoSliceMut::new(&mut frame.data)];
        match rustix::io::readv(&self.queue, parts) {
            Ok(length) => {
                frame.data.truncate(length.saturating_sub(Offload::BYTES));
                frame.offload = Offload::decode(&header);
                Ok(length >= Offload::BYTES)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self, offload: &Offload, data: &[u8]) -> Result<(), SendError> {
        let header = offload.encode();
        let parts = &[IoSlice::new(&header), IoSlice::new(data)];
        match rustix::io::retry_on_intr(|| rustix::io::writev(&self.queue, parts)) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(SendError::Full),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn accept(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (on, flag) in [
            (offloads.checksum, TUN_F_CSUM),
            (offloads.checksum && offloads.tcp4, TUN_F_TSO4),
            (offloads.checksum && offloads.tcp6, TUN_F_TSO6),
            (offloads.checksum && offloads.tcp4 && offloads.ecn, TUN_F_TSO_ECN),
        ] {
            flags |= if on { flag } else { 0 };
        }
        // SAFETY: the call takes a number.
        let done = unsafe {
            libc::ioctl(self.queue.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags))
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
