//! What a front end asks a back end for, in the order that the protocol wants.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::connection::{BackEndError, Connection, MAX_DESCRIPTORS};
use crate::message::{Request, state, words};

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VHOST_USER_F_PROTOCOL_FEATURES: beside virtio's feature bits, and never a driver's.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features that are taken.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;

/// Queues that any back end has where it does not say how many.
const QUEUES_WITHOUT_MQ: usize = 2;

/// Memory that the back end maps: `length` bytes of a file from `offset` on.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRegion<'a> {
    /// Where it is for descriptors.
    pub guest: u64,
    pub length: u64,
    pub file: BorrowedFd<'a>,
    pub offset: u64,
}

/// Where a queue is, in a region's addresses, and what it is signalled by.
#[derive(Clone, Copy, Debug)]
pub struct VringSetup<'a> {
    pub size: u16,
    /// The index of the available ring where the back end begins.
    pub base: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub kick: BorrowedFd<'a>,
    pub call: BorrowedFd<'a>,
}

/// A back end that answers.
///
/// After an error it is in a state that nobody knows: it is to be dropped.
pub struct Frontend {
    connection: Connection,
    features: u64,
    protocol: u64,
    queues: usize,
}

impl Frontend {
    /// Agrees on the protocol's features; no answer may take longer than `patience`.
    pub fn new(socket: UnixStream, patience: Duration) -> Result<Self, BackEndError> {
        let connection = Connection::new(socket, patience)?;
        let mut frontend = Self { connection, features: 0, protocol: 0, queues: QUEUES_WITHOUT_MQ };
        frontend.set(Request::SetOwner, &[], &[])?;
        let features = frontend.get(Request::GetFeatures)?;
        if features & VERSION_1 == 0 {
            return Err(BackEndError::Lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        if features & PROTOCOL_FEATURES == 0 {
            // Without them a queue cannot be disabled.
            return Err(BackEndError::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        frontend.features = features & !PROTOCOL_FEATURES;
        let offered = frontend.get(Request::GetProtocolFeatures)?;
        let protocol = offered & (MQ | REPLY_ACK | CONFIG);
        frontend.connection.send(Request::SetProtocolFeatures, false, &words(&[protocol]), &[])?;
        frontend.protocol = protocol;
        if protocol & MQ != 0 {
            let count = frontend.get(Request::GetQueueNum)?;
            frontend.queues = usize::try_from(count).unwrap_or(usize::MAX);
        }
        Ok(frontend)
    }

    /// What the back end offers of virtio's feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        self.queues
    }

    /// The first bytes of the device's configuration space.
    pub fn config(&self, length: usize) -> Result<Vec<u8>, BackEndError> {
        const FIELDS: usize = 12;
        if self.protocol & CONFIG == 0 {
            return Err(BackEndError::Lacks(
                "the device's configuration (VHOST_USER_PROTOCOL_F_CONFIG)",
            ));
        }
        // Offset, size, flags, and room for the answer.
        let mut payload = vec![0; FIELDS + length];
        payload[4..8].copy_from_slice(&(length as u32).to_ne_bytes());
        let request = Request::GetConfig;
        self.connection.send(request, false, &payload, &[])?;
        let answer = self.connection.answer(request, payload.len())?;
        if answer[..8] != payload[..8] {
            return Err(BackEndError::Answer(request));
        }
        Ok(answer[FIELDS..].to_vec())
    }

    /// The feature bits of virtio that are in use, before queues are started.
    pub fn set_features(&self, features: u64) -> Result<(), BackEndError> {
        self.set(Request::SetFeatures, &words(&[features | PROTOCOL_FEATURES]), &[])
    }

    /// All memory that descriptors and queues are in, in place of what was set before.
    pub fn set_memory(&self, regions: &[MemoryRegion<'_>]) -> Result<(), BackEndError> {
        if regions.len() > MAX_DESCRIPTORS {
            return Err(BackEndError::Regions);
        }
        let mut payload = words(&[regions.len() as u64]);
        for region in regions {
            // The second address is how queues are named (SET_VRING_ADDR). Ours would tell where
            // our memory is mapped; any that are unique will do.
            payload.extend(words(&[region.guest, region.length, region.guest, region.offset]));
        }
        let files: Vec<_> = regions.iter().map(|region| region.file).collect();
        self.set(Request::SetMemTable, &payload, &files)
    }

    pub fn start_queue(&self, index: usize, setup: &VringSetup<'_>) -> Result<(), BackEndError> {
        self.set(Request::SetVringNum, &state(index, setup.size.into()), &[])?;
        self.set(Request::SetVringBase, &state(index, setup.base.into()), &[])?;
        // Index and flags, then descriptors, used, available, and no log.
        let mut addresses = state(index, 0);
        addresses.extend(words(&[setup.descriptors, setup.used, setup.available, 0]));
        self.set(Request::SetVringAddr, &addresses, &[])?;
        self.set(Request::SetVringCall, &words(&[index as u64]), &[setup.call])?;
        self.set(Request::SetVringKick, &words(&[index as u64]), &[setup.kick])?;
        self.set(Request::SetVringEnable, &state(index, 1), &[])
    }

    /// Stops a queue; gives the index of the available ring where the back end was.
    pub fn stop_queue(&self, index: usize) -> Result<u16, BackEndError> {
        let request = Request::GetVringBase;
        self.connection.send(request, false, &state(index, 0), &[])?;
        let answer = self.connection.answer(request, 8)?;
        if answer[..4] != state(index, 0)[..4] {
            return Err(BackEndError::Answer(request));
        }
        let word = u32::from_ne_bytes([answer[4], answer[5], answer[6], answer[7]]);
        u16::try_from(word).map_err(|_| BackEndError::Answer(request))
    }

    /// To be called when the socket is readable: nothing is to come unasked.
    pub fn check(&self) -> Result<(), BackEndError> {
        self.connection.check()
    }

    fn get(&self, request: Request) -> Result<u64, BackEndError> {
        self.connection.send(request, false, &[], &[])?;
        let answer = self.connection.answer(request, 8)?;
        let mut word = [0; 8];
        word.copy_from_slice(&answer);
        Ok(u64::from_ne_bytes(word))
    }

    fn set(
        &self,
        request: Request,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), BackEndError> {
        let acknowledged = self.protocol & REPLY_ACK != 0;
        self.connection.send(request, acknowledged, payload, descriptors)?;
        if acknowledged && self.connection.answer(request, 8)? != words(&[0]) {
            return Err(BackEndError::Refused(request));
        }
        Ok(())
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

#[cfg(test)]
mod tests;
