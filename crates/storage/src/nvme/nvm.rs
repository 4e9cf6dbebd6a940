//! Commands of I/O queues (6): what they ask of the disk.

use tetrarch_block::{BlockInfo, Request};
use tetrarch_memory::{GuestMemory, ScatterList};

use super::command::Command;
use super::status::Status;
use super::{ALL_NAMESPACES, NAMESPACE, identify, prp};

/// Opcodes (figure 346).
const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// Of word 12: force unit access, and that zeroed blocks may be deallocated.
const FORCE_ACCESS: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;
/// Of word 11 of dataset management.
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
/// Bytes of one of its ranges: attributes, blocks, first block.
const RANGE: usize = 16;

/// A command as requests to the disk.
pub struct Work {
    pub requests: Vec<Request>,
    /// The command is done when they are on the disk.
    pub durable: bool,
    pub writes: bool,
}

/// `None` is a command that has nothing to do.
pub fn work(
    memory: &GuestMemory,
    info: &BlockInfo,
    command: &Command,
) -> Result<Option<Work>, Status> {
    if !command.is_plain() {
        return Err(Status::INVALID_FIELD);
    }
    match command.opcode() {
        FLUSH if command.namespace() == ALL_NAMESPACES => {}
        FLUSH | WRITE | READ | WRITE_ZEROES | DATASET_MANAGEMENT => {
            if command.namespace() != NAMESPACE {
                return Err(Status::INVALID_NAMESPACE);
            }
        }
        _ => return Err(Status::INVALID_OPCODE),
    }
    let force = command.word(12) & FORCE_ACCESS != 0;
    let one =
        |request, writes, durable| Ok(Some(Work { requests: vec![request], durable, writes }));
    match command.opcode() {
        FLUSH => one(Request::Flush, true, false),
        READ => {
            let (offset, length) = extent(info, start(command), count(command))?;
            let data = prp::data(memory, command, length)?;
            one(Request::Read { offset, data }, false, false)
        }
        WRITE => {
            let (offset, length) = extent(info, start(command), count(command))?;
            let data = prp::data(memory, command, length)?;
            one(Request::Write { offset, data }, true, force)
        }
        WRITE_ZEROES => {
            let (offset, length) = extent(info, start(command), count(command))?;
            let unmap = command.word(12) & DEALLOCATE != 0;
            one(Request::WriteZeroes { offset, length, unmap }, true, force)
        }
        _ => dataset_management(memory, info, command),
    }
}

/// Of what else a range may be said, nothing is to be done (6.7).
fn dataset_management(
    memory: &GuestMemory,
    info: &BlockInfo,
    command: &Command,
) -> Result<Option<Work>, Status> {
    let ranges = (command.word(10) as usize & 0xFF) + 1;
    let list: ScatterList = prp::data(memory, command, (ranges * RANGE) as u64)?;
    let mut bytes = vec![0; ranges * RANGE];
    list.read_at(0, &mut bytes);
    let mut requests = Vec::new();
    for range in bytes.as_chunks::<RANGE>().0 {
        let range = u128::from_le_bytes(*range);
        let (blocks, first) = ((range >> 32) as u32, (range >> 64) as u64);
        let (offset, length) = extent(info, first, blocks.into())?;
        if length > 0 {
            requests.push(Request::Discard { offset, length });
        }
    }
    if command.word(11) & ATTRIBUTE_DEALLOCATE == 0 || requests.is_empty() {
        return Ok(None);
    }
    Ok(Some(Work { requests, durable: false, writes: true }))
}

/// The first block of a command.
pub fn start(command: &Command) -> u64 {
    u64::from(command.word(10)) | u64::from(command.word(11)) << 32
}

fn count(command: &Command) -> u64 {
    u64::from(command.word(12) & 0xFFFF) + 1
}

/// Blocks as bytes of the disk.
fn extent(info: &BlockInfo, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
    let end = first.checked_add(blocks).ok_or(Status::LBA_RANGE)?;
    if end > identify::blocks(info) {
        return Err(Status::LBA_RANGE);
    }
    // Inside the disk, whose size is one of 64 bits.
    let block = u64::from(info.block_size.max(512));
    Ok((first * block, blocks * block))
}
