//! Event channels of a domain (public/event_channel.h, the 2-level ABI): what each port is bound
//! to. Bits in guest memory are the [`Domain`](crate::Domain)'s affair.

use crate::errno;

/// 64 words of 64 bits. Port 0 is none.
pub const PORTS: u32 = 4096;

/// Numbers of VIRQs; those above are nobody's.
pub const VIRQS: u32 = 24;
pub mod virq {
    pub const TIMER: u32 = 0;
    pub const DEBUG: u32 = 1;
    pub const XENOPROF: u32 = 7;
    pub const XENPMU: u32 = 13;
}

/// Whether each vCPU has its own of a VIRQ.
fn is_per_vcpu(virq: u32) -> bool {
    matches!(virq, virq::TIMER | virq::DEBUG | virq::XENOPROF | virq::XENPMU)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Free,
    /// Waits for a domain to bind it.
    Unbound {
        remote: u16,
    },
    /// The other end is a port of the same domain.
    Own {
        port: u32,
    },
    Virq(u32),
    Ipi,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    pub channel: Channel,
    /// Whose upcall it is.
    pub vcpu: u32,
}

const FREE: Port = Port { channel: Channel::Free, vcpu: 0 };

/// The result of an operation, or an error number.
pub type Result<T> = std::result::Result<T, i64>;

pub struct Channels {
    ports: Vec<Port>,
    vcpus: u32,
}

impl Channels {
    pub fn new(vcpus: u32) -> Self {
        Self { ports: vec![FREE], vcpus }
    }

    pub fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// As they were saved.
    pub fn set_ports(&mut self, ports: Vec<Port>) -> Result<()> {
        let in_order = ports.len() <= PORTS as usize
            && ports.first() == Some(&FREE)
            && ports.iter().all(|port| port.vcpu < self.vcpus)
            && ports.iter().enumerate().all(|(number, port)| match port.channel {
                Channel::Own { port: other } => ports
                    .get(other as usize)
                    .is_some_and(|one| one.channel == Channel::Own { port: number as u32 }),
                Channel::Virq(virq) => virq < VIRQS,
                _ => true,
            });
        if !in_order {
            return Err(errno::INVAL);
        }
        self.ports = ports;
        Ok(())
    }

    pub fn get(&self, port: u32) -> Result<Port> {
        match self.ports.get(port as usize) {
            Some(found) if found.channel != Channel::Free => Ok(*found),
            _ => Err(errno::INVAL),
        }
    }

    fn allocate(&mut self, made: Port) -> Result<u32> {
        let free = self.ports.iter().skip(1).position(|port| port.channel == Channel::Free);
        match free {
            Some(at) => {
                self.ports[at + 1] = made;
                Ok(at as u32 + 1)
            }
            None if self.ports.len() < PORTS as usize => {
                self.ports.push(made);
                Ok(self.ports.len() as u32 - 1)
            }
            None => Err(errno::NOSPC),
        }
    }

    /// EVTCHNOP_alloc_unbound.
    pub fn allocate_unbound(&mut self, remote: u16) -> Result<u32> {
        self.allocate(Port { channel: Channel::Unbound { remote }, vcpu: 0 })
    }

    /// EVTCHNOP_bind_interdomain to a port of `domid`, which is the domain itself.
    pub fn bind_own(&mut self, domid: u16, remote_port: u32) -> Result<u32> {
        if self.get(remote_port)?.channel != (Channel::Unbound { remote: domid }) {
            return Err(errno::INVAL);
        }
        let port = self.allocate(Port { channel: Channel::Own { port: remote_port }, vcpu: 0 })?;
        self.ports[remote_port as usize].channel = Channel::Own { port };
        Ok(port)
    }

    /// EVTCHNOP_bind_virq.
    pub fn bind_virq(&mut self, virq: u32, vcpu: u32) -> Result<u32> {
        if virq >= VIRQS || vcpu != 0 && !is_per_vcpu(virq) {
            return Err(errno::INVAL);
        }
        self.check_vcpu(vcpu)?;
        if self.of_virq(virq, vcpu).is_some() {
            return Err(errno::EXIST);
        }
        self.allocate(Port { channel: Channel::Virq(virq), vcpu })
    }

    /// EVTCHNOP_bind_ipi.
    pub fn bind_ipi(&mut self, vcpu: u32) -> Result<u32> {
        self.check_vcpu(vcpu)?;
        self.allocate(Port { channel: Channel::Ipi, vcpu })
    }

    /// EVTCHNOP_bind_vcpu.
    pub fn bind_vcpu(&mut self, port: u32, vcpu: u32) -> Result<()> {
        self.check_vcpu(vcpu)?;
        match self.get(port)?.channel {
            Channel::Virq(virq) if is_per_vcpu(virq) => Err(errno::INVAL),
            Channel::Ipi | Channel::Free => Err(errno::INVAL),
            Channel::Virq(_) | Channel::Unbound { .. } | Channel::Own { .. } => {
                self.ports[port as usize].vcpu = vcpu;
                Ok(())
            }
        }
    }

    /// EVTCHNOP_close. The other end waits for somebody again.
    pub fn close(&mut self, port: u32, domid: u16) -> Result<()> {
        if let Channel::Own { port: other } = self.get(port)?.channel
            && let Some(other) = self.ports.get_mut(other as usize)
        {
            other.channel = Channel::Unbound { remote: domid };
        }
        self.ports[port as usize] = FREE;
        Ok(())
    }

    /// The port at which a vCPU hears of a VIRQ.
    pub fn of_virq(&self, virq: u32, vcpu: u32) -> Option<u32> {
        let wanted = Channel::Virq(virq);
        let found = self.ports.iter().position(|port| port.channel == wanted && port.vcpu == vcpu);
        found.map(|port| port as u32)
    }

    /// The ports whose upcalls are a vCPU's.
    pub fn of_vcpu(&self, vcpu: u32) -> Vec<u32> {
        let of = |(number, port): (usize, &Port)| {
            (port.channel != Channel::Free && port.vcpu == vcpu).then_some(number as u32)
        };
        self.ports.iter().enumerate().filter_map(of).collect()
    }

    /// Where an event that is sent by a port arrives; `None` where nobody is bound to it.
    pub fn destination(&self, port: u32) -> Result<Option<u32>> {
        match self.get(port)?.channel {
            Channel::Own { port: other } => Ok(Some(other)),
            Channel::Ipi => Ok(Some(port)),
            Channel::Unbound { .. } => Ok(None),
            Channel::Virq(_) | Channel::Free => Err(errno::INVAL),
        }
    }

    fn check_vcpu(&self, vcpu: u32) -> Result<()> {
        if vcpu < self.vcpus { Ok(()) } else { Err(errno::NOENT) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_from_one_on_and_again() {
        let mut channels = Channels::new(2);
        assert_eq!(channels.bind_ipi(0), Ok(1));
        assert_eq!(channels.bind_virq(virq::TIMER, 1), Ok(2));
        assert_eq!(channels.close(1, 1), Ok(()));
        assert_eq!(channels.close(1, 1), Err(errno::INVAL));
        assert_eq!(channels.allocate_unbound(0), Ok(1));
        assert_eq!(channels.of_virq(virq::TIMER, 1), Some(2));
        assert_eq!(channels.of_virq(virq::TIMER, 0), None);
    }

    #[test]
    fn a_virq_is_bound_once_and_global_ones_to_the_first_vcpu() {
        let mut channels = Channels::new(2);
        assert_eq!(channels.bind_virq(virq::DEBUG, 0), Ok(1));
        assert_eq!(channels.bind_virq(virq::DEBUG, 0), Err(errno::EXIST));
        assert_eq!(channels.bind_virq(virq::DEBUG, 1), Ok(2));
        assert_eq!(channels.bind_virq(2, 1), Err(errno::INVAL), "the console's");
        assert_eq!(channels.bind_virq(2, 0), Ok(3));
        assert_eq!(channels.bind_virq(VIRQS, 0), Err(errno::INVAL));
        assert_eq!(channels.bind_virq(virq::TIMER, 2), Err(errno::NOENT), "no such vCPU");
        assert_eq!(channels.bind_vcpu(1, 1), Err(errno::INVAL));
        assert_eq!(channels.bind_vcpu(3, 1), Ok(()));
    }

    #[test]
    fn two_ends_of_one_domain_find_each_other() {
        let mut channels = Channels::new(1);
        assert_eq!(channels.allocate_unbound(5), Ok(1));
        assert_eq!(channels.destination(1), Ok(None));
        assert_eq!(channels.bind_own(5, 1), Ok(2));
        assert_eq!(channels.bind_own(5, 1), Err(errno::INVAL), "it is taken");
        assert_eq!((channels.destination(1), channels.destination(2)), (Ok(Some(2)), Ok(Some(1))));
        assert_eq!(channels.close(1, 5), Ok(()));
        assert_eq!(channels.get(2).unwrap().channel, Channel::Unbound { remote: 5 });
        assert_eq!(channels.allocate_unbound(3), Ok(1));
        assert_eq!(channels.bind_own(5, 1), Err(errno::INVAL), "it waits for another domain");
    }

    #[test]
    fn no_more_ports_than_there_are() {
        let mut channels = Channels::new(1);
        for port in 1..PORTS {
            assert_eq!(channels.bind_ipi(0), Ok(port));
        }
        assert_eq!(channels.bind_ipi(0), Err(errno::NOSPC));
        assert_eq!(channels.get(0), Err(errno::INVAL));
        assert_eq!(channels.get(PORTS), Err(errno::INVAL));
    }

    #[test]
    fn a_damaged_table_is_refused() {
        let mut channels = Channels::new(1);
        let port = |channel| Port { channel, vcpu: 0 };
        let (free, lost) = (port(Channel::Free), port(Channel::Own { port: 9 }));
        assert_eq!(channels.set_ports(vec![free, lost]), Err(errno::INVAL));
        assert_eq!(channels.set_ports(vec![]), Err(errno::INVAL));
        assert_eq!(channels.set_ports(vec![free, Port { vcpu: 1, ..free }]), Err(errno::INVAL));
        assert_eq!(channels.set_ports(vec![free, port(Channel::Virq(99))]), Err(errno::INVAL));
        assert_eq!(channels.set_ports(vec![free, port(Channel::Ipi)]), Ok(()));
    }
}
