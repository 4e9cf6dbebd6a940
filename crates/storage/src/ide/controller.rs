//! The controller: its ports, life, saved state.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tetrarch_bus::{Device as BusDevice, DeviceError};
use tetrarch_devices::Drive as Line;
use tetrarch_io::{Attachment, Handler, IoThread};
use tetrarch_memory::GuestMemory;

use super::channel::{BUFFER, Channel, Device, Purpose, Wait, Work};
use super::device::Registers;
use super::{CHANNELS, DRIVES};
use crate::ata::{Drive, status};
use crate::landed::Landed;
use crate::saved::{DamagedState, load_drive, save_drive};
use crate::scsi;

struct Channels(Vec<Channel>, Arc<Landed>);

impl Handler for Channels {
    fn ready(&mut self, source: u32) {
        if let Some(channel) = self.0.get_mut(source as usize / DRIVES) {
            channel.finish();
        }
        self.1.signal();
    }

    fn settled(&mut self) -> bool {
        self.quiesce()
    }

    fn quiesce(&mut self) -> bool {
        let mut idle = true;
        for requests in self.0.iter_mut().flat_map(Channel::requests) {
            requests.hurry();
            idle &= requests.idle();
        }
        idle
    }
}

/// A controller at rest, in numbers: of each channel, of the bytes that its host moves, eight
/// in each, and of each drive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    pub channels: Vec<Vec<u64>>,
    pub buffers: Vec<Vec<u64>>,
    pub drives: Vec<Vec<u64>>,
}

/// One controller of a machine.
///
/// Lock: `channels`, held for an access to a register and while the I/O thread answers;
/// lines are driven under it.
pub struct Ide {
    channels: Arc<Mutex<Channels>>,
    landed: Arc<Landed>,
    name: String,
    attachment: Attachment,
}

impl Ide {
    /// With the drives of its channels, by their names, and the lines of the channels.
    pub fn new(
        thread: &IoThread,
        memory: &Arc<GuestMemory>,
        name: &str,
        drives: Vec<Option<(String, Drive)>>,
        lines: [Line; CHANNELS],
    ) -> io::Result<Self> {
        let mut drives = drives.into_iter();
        let mut device = || {
            let (name, drive) = drives.next()??;
            Some(Device::new(name, drive))
        };
        let mut channels = Vec::new();
        for (number, line) in lines.into_iter().enumerate() {
            let devices = [device(), device()];
            let channel = Channel::new(number, Arc::clone(memory), devices, line);
            channels.push(channel.map_err(io::Error::other)?);
        }
        let landed = Arc::new(Landed::default());
        let channels = Arc::new(Mutex::new(Channels(channels, Arc::clone(&landed))));
        let attachment = thread.attach(name, Arc::clone(&channels) as _);
        for channel in &mut channels.lock().0 {
            (0..DRIVES).for_each(|index| channel.open(index, &attachment));
        }
        Ok(Self { channels, landed, name: name.into(), attachment })
    }

    fn with<T>(&self, channel: usize, body: impl FnOnce(&mut Channel) -> T) -> Option<T> {
        self.channels.lock().0.get_mut(channel).map(body)
    }

    pub fn reset(&self) {
        for channel in &mut self.channels.lock().0 {
            channel.reset(&self.attachment);
        }
    }

    /// Whether bus masters may access memory; at first they may. When it was taken from them,
    /// nothing is read or written there any more, and they go on when it is given back.
    pub fn set_master(&self, master: bool) {
        let mut channels = self.channels.lock();
        channels.0.iter_mut().for_each(|channel| channel.set_bus(master));
        if !master {
            self.landed.wait(&self.name, &mut channels, |channels| {
                channels.0.iter_mut().filter_map(|one| (!one.settled()).then_some(())).count() == 0
            });
        }
    }

    /// How many requests wait for the host to be mended: they are no part of a saved state.
    pub fn stopped(&self) -> usize {
        let channels = &mut self.channels.lock().0;
        channels.iter_mut().flat_map(Channel::requests).map(|requests| requests.stopped()).sum()
    }

    /// Lets go of the disks.
    pub fn close(&self) {
        self.channels.lock().0.iter_mut().for_each(Channel::close);
    }

    /// Exact while the machine is held.
    pub fn save(&self) -> Saved {
        let mut saved = Saved::default();
        for channel in &self.channels.lock().0 {
            saved.channels.push(save_channel(channel));
            let bytes = channel.work.buffer.chunks(8);
            let word = |bytes: &[u8]| {
                bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
            };
            saved.buffers.push(bytes.map(word).collect());
            for device in &channel.devices {
                let state = device.as_ref().map(|device| save_drive(&device.drive));
                saved.drives.push(state.unwrap_or_default());
            }
        }
        saved
    }

    /// On an error the controller is to be reset.
    pub fn load(&self, saved: &Saved) -> Result<(), DamagedState> {
        self.reset();
        let channels = &mut self.channels.lock().0;
        let lengths = [saved.channels.len(), saved.buffers.len(), saved.drives.len() / DRIVES];
        if lengths != [channels.len(); 3] || !saved.drives.len().is_multiple_of(DRIVES) {
            return Err(DamagedState);
        }
        for (index, channel) in channels.iter_mut().enumerate() {
            let drives = &saved.drives[DRIVES * index..][..DRIVES];
            for (device, saved) in channel.devices.iter_mut().zip(drives) {
                match device {
                    Some(device) => load_drive(&mut device.drive, saved)?,
                    None if saved.is_empty() => {}
                    None => return Err(DamagedState),
                }
            }
            load_channel(channel, &saved.channels[index], &saved.buffers[index])?;
            channel.drive_line();
        }
        Ok(())
    }
}

fn save_channel(channel: &Channel) -> Vec<u64> {
    let master = channel.master;
    let mut saved = vec![
        channel.control.into(),
        channel.interrupt.into(),
        master.command.into(),
        master.status.into(),
        master.table.into(),
    ];
    for Registers { status, error, features, count, lba, device } in channel.registers {
        saved.extend([u64::from(status), error.into(), features.into(), count.into()]);
        saved.extend(lba.map(u64::from));
        saved.push(device.into());
    }
    let work = &channel.work;
    saved.extend([
        work.wait as u64,
        work.purpose as u64,
        work.packet.into(),
        work.writes.into(),
        work.durable.into(),
        work.dma.into(),
        work.offset,
        work.left,
        work.block as u64,
        work.at as u64,
        work.end as u64,
        work.buffer.len() as u64,
    ]);
    saved
}

fn load_channel(channel: &mut Channel, saved: &[u64], buffer: &[u64]) -> Result<(), DamagedState> {
    let (&[control, interrupt, command, master_status, table], rest) =
        saved.split_first_chunk().ok_or(DamagedState)?;
    channel.control = control as u8;
    channel.interrupt = interrupt != 0;
    channel.master.command = command as u8 & 0b1001;
    channel.master.status = master_status as u8;
    channel.master.table = table as u32 & !3;
    let (registers, work) = rest.split_at_checked(8 * DRIVES).ok_or(DamagedState)?;
    for (registers, saved) in channel.registers.iter_mut().zip(registers.as_chunks::<8>().0) {
        let &[status, error, features, count, low, middle, high, device] = saved;
        *registers = Registers {
            status: status as u8,
            error: error as u8,
            features: features as u16,
            count: count as u16,
            lba: [low, middle, high].map(|byte| byte as u16),
            device: device as u8,
        };
        if channel.control & 1 << 2 == 0 {
            // Nothing is in flight: who is at rest and not in a reset is not busy.
            registers.status &= !status::BUSY;
        }
    }
    let &[wait, purpose, packet, writes, durable, dma, offset, left, block, at, end, length] = work
    else {
        return Err(DamagedState);
    };
    let wait = match wait {
        0 => Wait::Nothing,
        2 => Wait::Master,
        3 => Wait::Reads,
        4 => Wait::Writes,
        _ => return Err(DamagedState),
    };
    let purpose = match purpose {
        0 => Purpose::Data,
        1 => Purpose::Ranges,
        2 => Purpose::Packet,
        _ => return Err(DamagedState),
    };
    let limit = BUFFER as u64;
    let length_good = length <= limit && buffer.len() as u64 == length.div_ceil(8);
    let packet_good = purpose != Purpose::Packet || (length == scsi::PACKET as u64 && writes == 0);
    if !length_good || !packet_good || at > end || end > length || block > limit {
        return Err(DamagedState);
    }
    let mut bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(length as usize);
    channel.work = Work {
        wait,
        purpose,
        packet: packet != 0,
        writes: writes != 0,
        durable: durable != 0,
        dma: dma != 0,
        offset,
        left,
        block: block as usize,
        buffer: bytes,
        at: at as usize,
        end: end as usize,
    };
    Ok(())
}

/// The ports of a channel's device: 0x1F0 or 0x170 and on.
pub struct TaskPorts(pub Arc<Ide>, pub usize);

impl BusDevice for TaskPorts {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        let read = |channel: &mut Channel| {
            if offset == 0 {
                let words = 0..size.div_ceil(2);
                return words
                    .fold(0, |value, word| value | u64::from(channel.read_data()) << (16 * word));
            }
            (0..size).fold(0, |value, byte| {
                value | u64::from(channel.read(offset + u64::from(byte))) << (8 * byte)
            })
        };
        Ok(self.0.with(self.1, read).unwrap_or(u64::MAX))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        self.0.with(self.1, |channel| {
            if offset == 0 {
                for word in 0..size.div_ceil(2) {
                    channel.write_data((value >> (16 * word)) as u16);
                }
                return;
            }
            for byte in 0..size {
                let value = (value >> (8 * byte)) as u8;
                channel.write(offset + u64::from(byte), value, &self.0.attachment);
            }
        });
        Ok(())
    }
}

/// Alternate status and device control: 0x3F6 or 0x376.
pub struct ControlPort(pub Arc<Ide>, pub usize);

impl BusDevice for ControlPort {
    fn read(&self, _offset: u64, _size: u8) -> Result<u64, DeviceError> {
        Ok(self.0.with(self.1, |channel| channel.alternate_status().into()).unwrap_or(u64::MAX))
    }

    fn write(&self, _offset: u64, _size: u8, value: u64) -> Result<(), DeviceError> {
        self.0.with(self.1, |channel| channel.write_control(value as u8, &self.0.attachment));
        Ok(())
    }
}

/// The bus masters, eight ports for each channel.
pub struct MasterPorts(pub Arc<Ide>);

impl BusDevice for MasterPorts {
    fn read(&self, offset: u64, size: u8) -> Result<u64, DeviceError> {
        Ok((0..size).fold(0, |value, byte| {
            let at = offset + u64::from(byte);
            let read = self.0.with((at / 8) as usize, |channel| channel.read_master(at % 8));
            value | u64::from(read.unwrap_or(0xFF)) << (8 * byte)
        }))
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Result<(), DeviceError> {
        for byte in 0..size {
            let (at, value) = (offset + u64::from(byte), (value >> (8 * byte)) as u8);
            self.0.with((at / 8) as usize, |channel| {
                channel.write_master(at % 8, value, &self.0.attachment);
            });
        }
        Ok(())
    }
}
