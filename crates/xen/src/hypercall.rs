//! Hypercalls that a guest makes per event or per tick, of 64-bit guests: number in RAX, arguments
//! in RDI and RSI (Xen, docs/guest-guide/x86/hypercall-abi.rst).

use std::time::Duration;

use tetrarch_engine::Vcpu;

use crate::channels::Result;
use crate::{Domain, errno};

/// public/xen.h.
pub mod number {
    pub const MEMORY: u64 = 12;
    pub const SET_TIMER: u64 = 15;
    pub const VCPU: u64 = 24;
    pub const SCHED: u64 = 29;
    pub const EVENT_CHANNEL: u64 = 32;
}

// public/event_channel.h, sched.h and vcpu.h.
const EVTCHN_SEND: u64 = 4;
const EVTCHN_UNMASK: u64 = 9;
const SCHED_YIELD: u64 = 0;
const SCHED_POLL: u64 = 3;
const VCPU_STOP_PERIODIC: u64 = 7;
const VCPU_SET_SINGLESHOT: u64 = 8;
const VCPU_STOP_SINGLESHOT: u64 = 9;
/// VCPU_SSHOTTMR_future: a time that is over is an error.
const FUTURE: u32 = 1;

/// Ports that a guest may wait for at once; it waits for one.
const MAX_POLLED: usize = 128;
/// A waiting vCPU looks again after so long. Coming back without an event is allowed.
const POLL_NS: u64 = 200_000;

impl Domain {
    /// The result, for RAX; `None` for a call that is not of these. `arguments` are RDI, RSI and
    /// RDX.
    pub fn hypercall(
        &self,
        id: u32,
        vcpu: &mut dyn Vcpu,
        number: u64,
        arguments: [u64; 3],
    ) -> Option<i64> {
        let [first, second, third] = arguments;
        let result = match (number, first) {
            (number::EVENT_CHANNEL, EVTCHN_SEND) => {
                read_u32(vcpu, second).and_then(|port| self.send(port))
            }
            (number::EVENT_CHANNEL, EVTCHN_UNMASK) => {
                read_u32(vcpu, second).and_then(|port| self.unmask(port))
            }
            (number::SCHED, SCHED_YIELD) => {
                std::thread::yield_now();
                Ok(())
            }
            (number::SCHED, SCHED_POLL) => self.poll(vcpu, second),
            (number::SET_TIMER, deadline) => {
                self.set_timer(id, deadline);
                Ok(())
            }
            (number::VCPU, VCPU_STOP_PERIODIC) => Ok(()),
            (number::VCPU, VCPU_SET_SINGLESHOT) => self.set_own_timer(id, vcpu, second, third),
            (number::VCPU, VCPU_STOP_SINGLESHOT) if second == u64::from(id) => {
                self.set_timer(id, 0);
                Ok(())
            }
            (number::VCPU, VCPU_STOP_SINGLESHOT) => Err(errno::INVAL),
            (number::MEMORY | number::VCPU, _) => {
                self.note_tsc(vcpu);
                return None;
            }
            _ => return None,
        };
        Some(result.err().unwrap_or(0))
    }

    /// A vCPU sets no timer but its own.
    fn set_own_timer(&self, id: u32, vcpu: &mut dyn Vcpu, of: u64, argument: u64) -> Result<()> {
        let mut data = [0; 12];
        read(vcpu, argument, &mut data)?;
        let [deadline @ .., a, b, c, d] = data;
        let (deadline, flags) = (u64::from_le_bytes(deadline), u32::from_le_bytes([a, b, c, d]));
        if of != u64::from(id) {
            return Err(errno::INVAL);
        }
        if flags & FUTURE != 0 && deadline < self.now_ns() {
            return Err(errno::TIME);
        }
        // 0 stops none, as a time that is over is due at once.
        self.set_timer(id, deadline.max(1));
        Ok(())
    }

    /// SCHEDOP_poll: until one of the ports has an event, or a while.
    fn poll(&self, vcpu: &mut dyn Vcpu, argument: u64) -> Result<()> {
        let mut data = [0; 24];
        read(vcpu, argument, &mut data)?;
        let number =
            |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| data[at + byte]));
        let (ports, count, timeout) = (number(0), number(8) as u32 as usize, number(16));
        if count > MAX_POLLED {
            return Err(errno::INVAL);
        }
        let mut list = vec![0; count * 4];
        read(vcpu, ports, &mut list)?;
        let ports = list.chunks_exact(4).map(|port| match *port {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => 0,
        });
        let now = self.now_ns();
        if ports.into_iter().any(|port| self.is_pending(port)) || timeout != 0 && timeout <= now {
            return Ok(());
        }
        let left = if timeout == 0 { POLL_NS } else { (timeout - now).min(POLL_NS) };
        std::thread::sleep(Duration::from_nanos(left));
        Ok(())
    }
}

fn read(vcpu: &mut dyn Vcpu, linear: u64, data: &mut [u8]) -> Result<()> {
    if vcpu.peek(linear, data) == data.len() { Ok(()) } else { Err(errno::FAULT) }
}

fn read_u32(vcpu: &mut dyn Vcpu, linear: u64) -> Result<u32> {
    let mut data = [0; 4];
    read(vcpu, linear, &mut data)?;
    Ok(u32::from_le_bytes(data))
}
