//! Frames to test with.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use tetrarch_io::Event;

use crate::{Frame, Interest, NetBackend, Offload, Offloads, Packet, Sent, checksum};

const ADDRESSES: [u8; 12] = [0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1];

/// The sum of the pseudo header, as a sender leaves it.
fn partial(addresses: &[u8], protocol: u8, length: usize) -> [u8; 2] {
    let mut bytes = addresses.to_vec();
    bytes.extend_from_slice(&[0, protocol]);
    bytes.extend_from_slice(&(length as u16).to_be_bytes());
    (!checksum::of(&bytes)).to_be_bytes()
}

fn tcp(flags: u8, length: usize, addresses: &[u8]) -> Vec<u8> {
    let mut tcp = vec![0x10, 0, 0x20, 0, 0xFF, 0xFF, 0xFF, 0, 1, 2, 3, 4, 0x50, flags, 0xFF, 0xFF];
    tcp.extend_from_slice(&partial(addresses, 6, 20 + length));
    tcp.extend_from_slice(&[0, 0]);
    tcp.extend((0..length).map(|at| (at % 251) as u8));
    tcp
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = ADDRESSES.to_vec();
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[0xFF, 0xFE, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    let value = checksum::of(&frame[14..34]).to_be_bytes();
    frame[24..26].copy_from_slice(&value);
    frame.extend_from_slice(payload);
    frame
}

fn ipv6(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = ADDRESSES.to_vec();
    frame.extend_from_slice(&[0x86, 0xDD, 0x60, 0, 0, 0]);
    frame.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[protocol, 64]);
    frame.extend_from_slice(&IPV6);
    frame.extend_from_slice(payload);
    frame
}

const IPV6: [u8; 32] = [
    0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 2,
];

/// TCP from 10.0.0.1:4096 to 10.0.0.2:8192 with `length` bytes of data.
pub fn tcp4(length: usize, flags: u8) -> Vec<u8> {
    ipv4(6, &tcp(flags, length, &[10, 0, 0, 1, 10, 0, 0, 2]))
}

pub fn tcp6(length: usize, flags: u8) -> Vec<u8> {
    ipv6(6, &tcp(flags, length, &IPV6))
}

/// UDP from [fd00::1]:53 to [fd00::2]:1024.
pub fn udp6(data: &[u8]) -> Vec<u8> {
    let length = 8 + data.len();
    let mut udp = vec![0, 53, 4, 0];
    udp.extend_from_slice(&(length as u16).to_be_bytes());
    udp.extend_from_slice(&partial(&IPV6, 17, length));
    udp.extend_from_slice(data);
    ipv6(17, &udp)
}

/// A broadcast with a number in it.
pub fn numbered(number: u32) -> Vec<u8> {
    let mut frame = vec![0xFF; 6];
    frame.extend_from_slice(&[0x52, 0x54, 0, 0, 0, 9, 0x88, 0xB5]);
    frame.extend_from_slice(&number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

pub fn number_of(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[14..18].try_into().unwrap())
}

/// Gives back what it is sent.
pub struct Loopback {
    frames: VecDeque<Vec<u8>>,
    event: Event,
}

impl Default for Loopback {
    fn default() -> Self {
        Self { frames: VecDeque::new(), event: Event::new().unwrap() }
    }
}

impl NetBackend for Loopback {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn watch(&mut self, _interest: Interest) {}

    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn accept(&mut self, _offloads: Offloads) {}

    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let mut bytes = Vec::new();
        packet.copy_to(&mut bytes);
        self.frames.push_back(bytes);
        self.event.signal();
        Sent::Taken
    }

    fn receive(&mut self, frame: &mut Frame) -> bool {
        let Some(bytes) = self.frames.pop_front() else {
            self.event.take();
            return false;
        };
        frame.set(Offload::default(), &bytes);
        true
    }
}
