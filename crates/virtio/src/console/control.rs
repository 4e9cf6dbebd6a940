//! What device and driver tell each other about ports (5.3.6.2).

use super::{Port, PortKind};

/// struct virtio_console_control: le32 id, le16 event, le16 value.
pub const BYTES: usize = 8;

/// Events.
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver has not been told of a port yet, in the order in which it hears it. There is
/// one of each at most: a driver that asks again and again, and reads no answers, gets no queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due(u8);

impl Due {
    const ADD: u8 = 1 << 0;
    const KIND: u8 = 1 << 1;
    const SIZE: u8 = 1 << 2;
    const OPEN: u8 = 1 << 3;
    const ALL: u8 = (1 << 4) - 1;

    pub fn bits(self) -> u8 {
        self.0
    }

    pub fn from_bits(bits: u8) -> Self {
        Self(bits & Self::ALL)
    }

    /// The port's size has changed: only who knows of the port hears it.
    pub fn resized(&mut self) {
        self.0 |= Self::SIZE;
    }
}

/// Takes a message of the driver. Gives the port that it has opened.
pub fn take(message: [u8; BYTES], ports: &mut [Port]) -> Option<usize> {
    let id = u32::from_le_bytes([message[0], message[1], message[2], message[3]]);
    let event = u16::from_le_bytes([message[4], message[5]]);
    let yes = u16::from_le_bytes([message[6], message[7]]) == 1;
    if event == DEVICE_READY && yes {
        ports.iter_mut().for_each(|port| port.due.0 |= Due::ADD);
    }
    let index = usize::try_from(id).ok()?;
    let port = ports.get_mut(index)?;
    match event {
        PORT_READY if yes => {
            port.known = true;
            port.due.0 |= Due::KIND | Due::OPEN;
            if port.kind == PortKind::Console {
                port.due.0 |= Due::SIZE;
            }
        }
        PORT_OPEN => port.open = yes,
        _ => {}
    }
    (event == PORT_OPEN && yes).then_some(index)
}

/// The next message for the driver about this port.
pub fn next(id: usize, port: &mut Port) -> Option<Vec<u8>> {
    if !port.known {
        // It is told of no size before it knows the port.
        port.due.0 &= !Due::SIZE;
    }
    let bit = port.due.0 & port.due.0.wrapping_neg();
    port.due.0 &= !bit;
    let (event, more) = match bit {
        Due::ADD => (PORT_ADD, Vec::new()),
        Due::KIND => match &port.kind {
            PortKind::Console => (CONSOLE_PORT, Vec::new()),
            PortKind::Named(name) => (PORT_NAME, name.as_bytes().to_vec()),
        },
        // Columns, then rows; Linux before 6.15 reads them the other way round.
        Due::SIZE => {
            let (columns, rows) = port.size;
            (RESIZE, [columns.to_le_bytes(), rows.to_le_bytes()].concat())
        }
        Due::OPEN => (PORT_OPEN, Vec::new()),
        _ => return None,
    };
    let mut message = (id as u32).to_le_bytes().to_vec();
    message.extend(event.to_le_bytes());
    message.extend(1_u16.to_le_bytes());
    message.extend(more);
    Some(message)
}
