//! A domain: what its vCPUs see in memory, and how they hear of events.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock};
use tetrarch_engine::Vm;
use tetrarch_engine::cpuid::Topology;
use tetrarch_engine::pvclock::{Timebase, write_wall_clock};
use tetrarch_io::{Attachment, Handler, IoThread, Trigger};
use tetrarch_memory::{GuestMemory, GuestPhys, Window};

use crate::channels::{Channels, Port, Result, virq};
use crate::errno;
use crate::layout::{shared_info, vcpu_info};
use crate::timers::Timers;

const PAGE_SIZE: u64 = 4096;
/// Where messages to local APICs go; fixed delivery to a physical destination (Intel SDM 3A,
/// 11.11).
const MSI_ADDRESS: u64 = 0xFEE0_0000;
/// Vectors below are exceptions'.
const FIRST_VECTOR: u8 = 16;
const NS_PER_S: u64 = 1_000_000_000;
/// IA32_TIME_STAMP_COUNTER.
const TSC_MSR: u32 = 0x10;

/// What a vCPU has of it.
#[derive(Default)]
struct Vcpu {
    /// Its vcpu_info: in shared_info, or where it has registered one.
    info: RwLock<Option<Window>>,
    /// Another copy of its clock, which its programs read; 0: none.
    time: AtomicU64,
    /// Of its upcall; 0: none.
    vector: AtomicU8,
}

/// Locks: channels before timers, both before windows.
pub struct Domain {
    pub(crate) domid: u16,
    vm: Arc<dyn Vm>,
    memory: Arc<GuestMemory>,
    topology: Topology,
    time: Timebase,
    /// The guest's TSC less the machine's, once it is known: a reset begins it anew, and what was
    /// saved goes on. All vCPUs count alike.
    tsc_base: Mutex<Option<u64>>,
    shared: RwLock<Option<Window>>,
    vcpus: Box<[Vcpu]>,
    channels: Mutex<Channels>,
    timers: Arc<Mutex<Timers>>,
    attachment: OnceLock<Attachment>,
}

/// A domain between two instructions; addresses are guest physical.
pub struct Saved {
    pub shared_info: Option<u64>,
    pub vcpus: Vec<SavedVcpu>,
    pub ports: Vec<Port>,
    pub clock_ns: u64,
}

pub struct SavedVcpu {
    pub info: Option<u64>,
    pub time: u64,
    pub vector: u8,
    pub deadline: u64,
}

impl Domain {
    pub fn new(
        domid: u16,
        vm: Arc<dyn Vm>,
        memory: Arc<GuestMemory>,
        topology: Topology,
        io: &IoThread,
    ) -> io::Result<Arc<Self>> {
        let vcpus = topology.vcpus();
        let timers = Arc::new(Mutex::new(Timers::new(vcpus as usize)?));
        let domain = Arc::new(Self {
            domid,
            time: Timebase::new(Arc::clone(vm.clock()), vm.tsc_hz()),
            vm,
            memory,
            topology,
            tsc_base: Mutex::default(),
            shared: RwLock::default(),
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            channels: Mutex::new(Channels::new(vcpus)),
            timers: Arc::clone(&timers),
            attachment: OnceLock::new(),
        });
        let ticks = Arc::new(Mutex::new(Ticks(Arc::downgrade(&domain))));
        let attachment = io.attach("the timers of Xen's guest", ticks);
        attachment.add(&*timers.lock(), 0, Trigger::Readable)?;
        let _ = domain.attachment.set(attachment);
        Ok(domain)
    }

    pub fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// As a domain is built.
    pub fn reset(&self) {
        *self.channels.lock() = Channels::new(self.vcpus());
        let mut timers = self.timers.lock();
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            timers.set(number, 0, 0);
            *vcpu.info.write() = None;
            vcpu.time.store(0, Ordering::SeqCst);
            vcpu.vector.store(0, Ordering::SeqCst);
        }
        *self.shared.write() = None;
        *self.tsc_base.lock() = None;
    }

    /// To be called before the guest is told the time: how its TSC goes.
    pub(crate) fn note_tsc(&self, vcpu: &mut dyn tetrarch_engine::Vcpu) {
        let mut base = self.tsc_base.lock();
        if base.is_none()
            && let Ok(Some(tsc)) = vcpu.msr(TSC_MSR)
        {
            *base = Some(tsc.wrapping_sub(self.vm.clock().tsc()));
        }
    }

    pub fn with_channels<T>(&self, body: impl FnOnce(&mut Channels) -> T) -> T {
        body(&mut self.channels.lock())
    }

    /// Of the guest's clock, since the domain was made.
    pub fn now_ns(&self) -> u64 {
        self.time.guest_now_ns()
    }

    /// XENMAPSPACE_shared_info: the page is there from now on. EINVAL where there is no RAM.
    pub fn place_shared_info(&self, address: u64) -> Result<()> {
        let page = self.window(address, shared_info::BYTES)?;
        let mut content = vec![0; shared_info::BYTES];
        let mut placed = self.shared.write();
        if let Some(before) = &*placed {
            let _ = self.memory.read(before.start(), &mut content);
        }
        self.memory.write(GuestPhys(address), &content).map_err(|_| errno::INVAL)?;
        for (number, vcpu) in self.vcpus.iter().enumerate().take(shared_info::LEGACY_VCPUS) {
            let mut info = vcpu.info.write();
            let inside = |info: &Window| {
                placed.as_ref().is_some_and(|page| {
                    info.start().0.wrapping_sub(page.start().0) < shared_info::BYTES as u64
                })
            };
            if info.as_ref().is_none_or(inside) {
                let at = address + (shared_info::VCPU_INFO + number * vcpu_info::BYTES) as u64;
                *info = Some(self.window(at, vcpu_info::BYTES)?);
                self.write_time(GuestPhys(at + vcpu_info::TIME as u64));
            }
        }
        *placed = Some(page);
        drop(placed);
        let start = self.time.start_ns();
        write_wall_clock(&self.memory, GuestPhys(address + shared_info::WALL_CLOCK as u64), start);
        let high = ((start / NS_PER_S) >> 32) as u32;
        let at = GuestPhys(address + shared_info::WALL_CLOCK_HIGH as u64);
        self.memory.write(at, &high.to_le_bytes()).map_err(|_| errno::INVAL)
    }

    /// VCPUOP_register_vcpu_info. EINVAL for one that has, or where it cannot be.
    pub fn register_vcpu_info(&self, vcpu: u32, address: u64) -> Result<()> {
        let of = self.vcpus.get(vcpu as usize).ok_or(errno::NOENT)?;
        let in_page = address % PAGE_SIZE + vcpu_info::BYTES as u64 <= PAGE_SIZE;
        if !in_page || !address.is_multiple_of(8) {
            return Err(errno::INVAL);
        }
        let window = self.window(address, vcpu_info::BYTES)?;
        let mut info = of.info.write();
        let mut content = [0; vcpu_info::BYTES];
        if let Some(before) = &*info {
            let _ = self.memory.read(before.start(), &mut content);
        }
        self.memory.write(GuestPhys(address), &content).map_err(|_| errno::INVAL)?;
        self.write_time(GuestPhys(address + vcpu_info::TIME as u64));
        *info = Some(window);
        drop(info);
        // Those that came while it had none. Marking all as pending, as Xen does, would have the
        // vCPU's only upcall come before its local APIC is on.
        for port in self.channels.lock().of_vcpu(vcpu) {
            let (word, bit) = place(port);
            let waits = self.shared.read().as_ref().is_some_and(|page| {
                let pending = page.load_u64(shared_info::PENDING + word);
                pending & !page.load_u64(shared_info::MASK + word) & bit != 0
            });
            if waits {
                self.select(port, vcpu);
            }
        }
        Ok(())
    }

    /// VCPUOP_register_vcpu_time_memory_area.
    pub fn register_time(&self, vcpu: u32, address: u64) -> Result<()> {
        let of = self.vcpus.get(vcpu as usize).ok_or(errno::NOENT)?;
        self.window(address, vcpu_info::TIME_BYTES)?;
        of.time.store(address, Ordering::SeqCst);
        self.write_time(GuestPhys(address));
        Ok(())
    }

    /// HVMOP_set_evtchn_upcall_vector.
    pub fn set_upcall_vector(&self, vcpu: u32, vector: u8) -> Result<()> {
        let of = self.vcpus.get(vcpu as usize).ok_or(errno::NOENT)?;
        if vector < FIRST_VECTOR {
            return Err(errno::INVAL);
        }
        of.vector.store(vector, Ordering::SeqCst);
        // What came before is to be heard of too.
        let waits = of
            .info
            .read()
            .as_ref()
            .is_some_and(|info| info.load_u64(vcpu_info::UPCALL_PENDING) & 0xFF != 0);
        if waits {
            self.inject(vcpu, vector);
        }
        Ok(())
    }

    /// EVTCHNOP_close.
    pub fn close(&self, port: u32) -> Result<()> {
        self.channels.lock().close(port, self.domid)?;
        // Who binds it next is to find no event of before.
        if let Some(page) = &*self.shared.read() {
            let (word, bit) = place(port);
            page.clear_bits_u64(shared_info::PENDING + word, bit);
        }
        Ok(())
    }

    /// EVTCHNOP_send.
    pub fn send(&self, port: u32) -> Result<()> {
        let channels = self.channels.lock();
        if let Some(to) = channels.destination(port)? {
            let vcpu = channels.get(to)?.vcpu;
            drop(channels);
            self.set_pending(to, vcpu);
        }
        Ok(())
    }

    /// EVTCHNOP_unmask.
    pub fn unmask(&self, port: u32) -> Result<()> {
        let vcpu = self.channels.lock().get(port)?.vcpu;
        let shared = self.shared.read();
        let Some(page) = &*shared else { return Ok(()) };
        let (word, bit) = place(port);
        let was_masked = page.clear_bits_u64(shared_info::MASK + word, bit) & bit != 0;
        let waits = page.load_u64(shared_info::PENDING + word) & bit != 0;
        drop(shared);
        if was_masked && waits {
            self.select(port, vcpu);
        }
        Ok(())
    }

    pub fn is_pending(&self, port: u32) -> bool {
        let (word, bit) = place(port);
        let shared = self.shared.read();
        shared.as_ref().is_some_and(|page| {
            port < crate::PORTS && page.load_u64(shared_info::PENDING + word) & bit != 0
        })
    }

    /// A VIRQ of a vCPU, if that has bound it.
    pub fn send_virq(&self, virq: u32, vcpu: u32) {
        let port = self.channels.lock().of_virq(virq, vcpu);
        if let Some(port) = port {
            self.set_pending(port, vcpu);
        }
    }

    /// VCPUOP_set_singleshot_timer, or 0 to stop it. A time that is over is due at once.
    pub fn set_timer(&self, vcpu: u32, deadline_ns: u64) {
        let now = self.now_ns();
        self.timers.lock().set(vcpu as usize, deadline_ns, now);
    }

    pub fn save(&self) -> Saved {
        let deadlines = self.timers.lock().deadlines().to_vec();
        let start =
            |window: &RwLock<Option<Window>>| window.read().as_ref().map(|window| window.start().0);
        let of = |(vcpu, deadline): (&Vcpu, u64)| SavedVcpu {
            info: start(&vcpu.info),
            time: vcpu.time.load(Ordering::SeqCst),
            vector: vcpu.vector.load(Ordering::SeqCst),
            deadline,
        };
        Saved {
            shared_info: start(&self.shared),
            vcpus: self.vcpus.iter().zip(deadlines).map(of).collect(),
            ports: self.channels.lock().ports().to_vec(),
            clock_ns: self.now_ns(),
        }
    }

    /// Guest memory is the saved domain's, the machine stands, and its vCPUs' TSC is `tsc`. EINVAL
    /// for what no domain was.
    pub fn load(&self, saved: Saved, tsc: u64) -> Result<()> {
        if saved.vcpus.len() != self.vcpus.len() {
            return Err(errno::INVAL);
        }
        let window = |at: Option<u64>, bytes| at.map(|at| self.window(at, bytes)).transpose();
        let shared = window(saved.shared_info, shared_info::BYTES)?;
        let infos: Result<Vec<_>> =
            saved.vcpus.iter().map(|vcpu| window(vcpu.info, vcpu_info::BYTES)).collect();
        let infos = infos?;
        self.channels.lock().set_ports(saved.ports)?;
        *self.shared.write() = shared;
        let machine_tsc = self.vm.clock().tsc();
        *self.tsc_base.lock() = Some(tsc.wrapping_sub(machine_tsc));
        self.time.set(saved.clock_ns, machine_tsc);
        for ((number, vcpu), info) in saved.vcpus.iter().enumerate().zip(infos) {
            if let Some(info) = &info {
                self.write_time(info.start().offset(vcpu_info::TIME as u64));
            }
            let own = &self.vcpus[number];
            *own.info.write() = info;
            own.time.store(vcpu.time, Ordering::SeqCst);
            if vcpu.time != 0 {
                self.write_time(GuestPhys(vcpu.time));
            }
            own.vector.store(vcpu.vector, Ordering::SeqCst);
            self.set_timer(number as u32, vcpu.deadline);
        }
        Ok(())
    }

    fn window(&self, address: u64, bytes: usize) -> Result<Window> {
        Window::new(&self.memory.snapshot(), GuestPhys(address), bytes).map_err(|_| errno::INVAL)
    }

    /// A vcpu_time_info.
    fn write_time(&self, at: GuestPhys) {
        let base = self.tsc_base.lock().unwrap_or(0);
        self.time.write_system_time(&self.memory, at, base);
    }

    /// The order is that of the guest's own look: bit, word, upcall (Xen,
    /// xen/common/event_2l.c).
    fn set_pending(&self, port: u32, vcpu: u32) {
        let (word, bit) = place(port);
        let shared = self.shared.read();
        let Some(page) = &*shared else { return };
        let was_pending = page.set_bits_u64(shared_info::PENDING + word, bit) & bit != 0;
        let masked = page.load_u64(shared_info::MASK + word) & bit != 0;
        drop(shared);
        if !was_pending && !masked {
            self.select(port, vcpu);
        }
    }

    fn select(&self, port: u32, vcpu: u32) {
        let Some(of) = self.vcpus.get(vcpu as usize) else { return };
        let word = 1 << (port / u64::BITS);
        let info = of.info.read();
        let Some(window) = &*info else { return };
        if window.set_bits_u64(vcpu_info::SELECTOR, word) & word == 0 {
            drop(info);
            self.upcall(vcpu);
        }
    }

    /// Tells the vCPU that it has events, unless it knows.
    fn upcall(&self, vcpu: u32) {
        let Some(of) = self.vcpus.get(vcpu as usize) else { return };
        let vector = of.vector.load(Ordering::SeqCst);
        let knows = match &*of.info.read() {
            Some(info) => info.set_bits_u16(vcpu_info::UPCALL_PENDING, 1) & 0xFF != 0,
            None => true,
        };
        if !knows && vector != 0 {
            self.inject(vcpu, vector);
        }
    }

    fn inject(&self, vcpu: u32, vector: u8) {
        let destination = u64::from(self.topology.apic_id(vcpu));
        self.vm.msi(MSI_ADDRESS | destination << 12, vector.into());
    }
}

/// Where a port's bit is: the offset of its word, and the bit.
fn place(port: u32) -> (usize, u64) {
    ((port / u64::BITS) as usize * 8, 1 << (port % u64::BITS))
}

/// On the I/O thread.
struct Ticks(Weak<Domain>);

impl Handler for Ticks {
    fn ready(&mut self, _source: u32) {
        let Some(domain) = self.0.upgrade() else { return };
        let now = domain.now_ns();
        let due = domain.timers.lock().take_due(now);
        for vcpu in due {
            domain.send_virq(virq::TIMER, vcpu);
        }
    }
}
