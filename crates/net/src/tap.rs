//! A tap device of the host (Linux, Documentation/networking/tuntap.rst).
//!
//! Frames have a virtio-net header before them, so that the kernel completes checksums
//! and divides segments, or leaves that to the network behind.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use smallvec::SmallVec;

use crate::watch::Watch;
use crate::{
    Counters, Direction, DropReason, Frame, HEADER, Interest, MAX_FRAME, MIN_FRAME, NetBackend,
    Offload, Offloads, Packet, Payload, Sent,
};

// linux/if_tun.h
const TUNGETIFF: libc::c_ulong = 0x8004_54D2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54D0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54D8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54D9;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;

/// What one system call takes (IOV_MAX).
const MAX_PIECES: usize = 1024;

/// One queue of a tap device.
pub struct Tap {
    device: OwnedFd,
    watch: Watch,
    watched: Interest,
    multi_queue: bool,
    enabled: bool,
    /// Somebody has removed the device.
    gone: bool,
    counters: Arc<Counters>,
    whole: Vec<u8>,
}

impl Tap {
    /// Of a descriptor of /dev/net/tun that was given its device (TUNSETIFF), with
    /// IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    pub fn new(device: OwnedFd, counters: Arc<Counters>) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&device, true)?;
        // SAFETY: an ifreq of zeroes is one: an empty name and no flags.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an ifreq, which is there.
        check(unsafe { libc::ioctl(device.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
        // SAFETY: it has set the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if flags & IFF_TAP == 0 || flags & IFF_VNET_HDR == 0 {
            return Err(io::Error::other("it is no tap device with IFF_VNET_HDR"));
        }
        let size = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which is there.
        check(unsafe { libc::ioctl(device.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })?;
        let watch = Watch::new()?;
        watch.set(&device, true, false);
        let mut tap = Self {
            device,
            watch,
            watched: Interest { receive: true, send: false },
            multi_queue: flags & IFF_MULTI_QUEUE != 0,
            enabled: true,
            gone: false,
            counters,
            whole: Vec::new(),
        };
        tap.accept(Offloads::NONE);
        Ok(tap)
    }

    fn write(&self, packet: &Packet<'_>) -> Result<usize, Errno> {
        let header = packet.offload.encode(0);
        let mut pieces = SmallVec::new();
        packet.iovecs(&header, &mut pieces);
        let count = pieces.len() as libc::c_int;
        // SAFETY: `pieces` are of `header` and of the packet's payload, both of which live
        // longer than the call: a slice, or a scatter list that keeps guest RAM mapped. The
        // kernel only reads them.
        let written = unsafe { libc::writev(self.device.as_raw_fd(), pieces.as_ptr(), count) };
        usize::try_from(written).map_err(|_| last_error())
    }

    /// What is not there any more is an event always: it is waited for no longer.
    fn end(&mut self) {
        if self.enabled && !self.gone {
            log::warn!("the link is down: the tap device was removed");
            self.watch.set(&self.device, false, false);
            self.gone = true;
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl NetBackend for Tap {
    fn event(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    fn watch(&mut self, interest: Interest) {
        if interest != self.watched && !self.gone {
            self.watch.set(&self.device, interest.receive, interest.send);
            self.watched = interest;
        }
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn accept(&mut self, offloads: Offloads) {
        let mut flags = 0;
        for (bit, on) in [
            (TUN_F_CSUM, offloads.checksum),
            (TUN_F_TSO4, offloads.tcp4),
            (TUN_F_TSO6, offloads.tcp6),
            (TUN_F_TSO_ECN, offloads.ecn && (offloads.tcp4 || offloads.tcp6)),
        ] {
            // Segments are left with their checksum, or not at all.
            if on && offloads.checksum {
                flags |= bit;
            }
        }
        let flags = libc::c_ulong::from(flags);
        // SAFETY: TUNSETOFFLOAD takes a number.
        let result = check(unsafe { libc::ioctl(self.device.as_raw_fd(), TUNSETOFFLOAD, flags) });
        if let Err(error) = result {
            // Since Linux 2.6.27 there is none that lacks one of them.
            log::error!("the tap device refuses its offloads: {error}");
        }
    }

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if !packet.is_sound() {
            self.counters.dropped(Direction::Sent, DropReason::Malformed);
            return Sent::Taken;
        }
        let many = match packet.payload {
            Payload::Guest(list) => list.iovecs().len() >= MAX_PIECES,
            Payload::Headed(_, rest) => rest.iovecs().len() + 1 >= MAX_PIECES,
            Payload::Bytes(_) => false,
        };
        let result = if many {
            let mut whole = std::mem::take(&mut self.whole);
            packet.copy_to(&mut whole);
            let payload = Payload::Bytes(&whole);
            let result = self.write(&Packet { offload: packet.offload, payload });
            self.whole = whole;
            result
        } else {
            self.write(packet)
        };
        match result {
            Ok(_) => {}
            // A limit (TUNSETSNDBUF) of who opened it.
            Err(Errno::AGAIN) => return Sent::Busy,
            // Down, or removed.
            Err(error @ (Errno::IO | Errno::BADFD | Errno::NETDOWN)) => {
                self.counters.dropped(Direction::Sent, DropReason::NoPeer);
                if error == Errno::BADFD {
                    self.end();
                }
            }
            Err(_) => self.counters.dropped(Direction::Sent, DropReason::Refused),
        }
        Sent::Taken
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        loop {
            frame.data.clear();
            frame.data.reserve(HEADER + MAX_FRAME);
            frame.start = HEADER;
            let room = rustix::buffer::spare_capacity(&mut frame.data);
            match rustix::io::read(&self.device, room) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::BADFD) => {
                    self.end();
                    return false;
                }
                Err(_) => return false,
            }
            let header = frame.data.first_chunk::<HEADER>();
            let decoded = header.and_then(|header| Offload::decode(header).ok());
            if let Some(offload) = decoded
                && frame.bytes().len() >= MIN_FRAME
            {
                frame.offload = offload;
                return true;
            }
            self.counters.dropped(Direction::Received, DropReason::Malformed);
        }
    }

    fn enable(&mut self, on: bool) {
        if !self.multi_queue || on == self.enabled {
            return;
        }
        // SAFETY: an ifreq of zeroes is one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if on { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads an ifreq, which is there.
        let result =
            check(unsafe { libc::ioctl(self.device.as_raw_fd(), TUNSETQUEUE, &raw const request) });
        match result {
            Ok(()) => self.enabled = on,
            Err(error) => log::warn!("a queue of the tap device cannot be switched: {error}"),
        }
    }

    fn link(&self) -> bool {
        !self.gone
    }
}
