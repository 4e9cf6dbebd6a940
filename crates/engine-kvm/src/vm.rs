//! One virtual machine: how it is made, and the contract's `Vm`.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::Mutex;
use tetrarch_engine::cpuid::{Topology, host_is_intel};
use tetrarch_engine::{
    Clock, CpuModel, DirtyPages, Doorbell, Doorbells, EngineError, Irqfd, IrqfdId, Irqfds, Msi,
    Platform, Vcpu, Vm, VmState,
};
use tetrarch_memory::GuestMemory;

use crate::chipset;
use crate::cpuid::{self, Policy};
use crate::debug;
use crate::dirty::DirtyTracking;
use crate::error::refused;
use crate::eventfd;
use crate::halt::HaltWatch;
use crate::host;
use crate::irqchip::{self, IrqChip};
use crate::memory_changes::MemoryChanges;
use crate::msr::MsrPolicy;
use crate::platform;
use crate::shared::VmShared;
use crate::slots::MemorySlots;
use crate::time::KvmClock;
use crate::vcpu::KvmVcpu;

/// Where Intel CPUs without "unrestricted guest" keep what KVM needs for real
/// mode: three pages and one, between the local APICs and the end of 4 GiB,
/// where the PC has a ROM at most (api.rst, 4.36 and 4.41).
const TSS_ADDRESS: usize = 0xFFFB_D000;
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;

/// Choices for a VM of this engine.
#[derive(Clone, Debug)]
pub struct Config {
    pub topology: Topology,
    pub device: String,
    pub dirty: DirtyTracking,
    pub platform: Platform,
    pub cpu: CpuModel,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            topology: Topology::flat(1),
            device: host::DEVICE.into(),
            dirty: DirtyTracking::Bitmap,
            platform: Platform::default(),
            cpu: CpuModel::default(),
        }
    }
}

pub fn create_vm(memory: Arc<GuestMemory>, config: Config) -> Result<Arc<KvmVm>, EngineError> {
    let kvm = host::open(&config.device)?;
    check_vcpus(config.topology.vcpus(), kvm.get_max_vcpus() as u32)?;
    let fd = create(&kvm)?;
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(|error| refused("place its page for real mode", error))?;
    }
    if kvm.check_extension(Cap::SetTssAddr) {
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(|error| refused("place its pages for real mode", error))?;
    }
    let irqchip = IrqChip::create(&fd)?;
    let slots = MemorySlots::new(&fd, config.dirty)?;
    memory.regions().iter().try_for_each(|region| slots.map(&fd, region))?;
    enable_hypercall_exits(&fd);
    platform::prepare(&kvm, &fd, &config.platform)?;

    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|error| refused("say what its CPUs can do", error))?;
    let policy = Policy {
        topology: config.topology,
        intel: host_is_intel(),
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    };
    let msrs = MsrPolicy::new(&kvm, cpuid::has_arch_capabilities(&supported));
    let shared = Arc::new(VmShared {
        fd,
        memory,
        clock: Arc::new(Clock::new()),
        supported,
        policy,
        msrs,
        slots: Arc::clone(&slots),
        platform: config.platform.clone(),
        cpu: config.cpu.clone(),
        halts: HaltWatch::default(),
        kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
        xcrs: kvm.check_extension(Cap::Xcrs),
        debugregs: kvm.check_extension(Cap::Debugregs),
        events: kvm.check_extension(Cap::VcpuEvents),
        debug_block_irq: debug::may_block_interrupts(&kvm),
        tsc_hz: OnceLock::new(),
    });
    let kvmclock = Arc::new(KvmClock::new(Arc::downgrade(&shared)));
    shared.clock.set_follower(Arc::clone(&kvmclock) as _);
    let changes = MemoryChanges { vm: Arc::downgrade(&shared), slots };
    shared.memory.add_observer(Arc::new(changes));
    Ok(Arc::new(KvmVm {
        shared,
        kvmclock,
        irqchip,
        doorbells: Mutex::default(),
        irqfds: Mutex::default(),
        config,
        created: Mutex::default(),
    }))
}

fn check_vcpus(vcpus: u32, max: u32) -> Result<(), EngineError> {
    if vcpus == 0 || vcpus > max {
        return Err(EngineError::Refused(format!(
            "{vcpus} vCPUs cannot be: the host's KVM runs 1 to {max}"
        ))
        .mended_by(format!("ask for at most {} CPUs", vcpus.clamp(1, max.max(1)))));
    }
    Ok(())
}

/// A signal may end the ioctl early on a busy host; once more then.
fn create(kvm: &Kvm) -> Result<VmFd, EngineError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(|error| refused("make a virtual machine", error)),
        }
    }
}

/// Hypercalls that KVM would hand to a VMM reach ours, where they are answered
/// with "unknown" by a plain table, as everywhere on a host without the call.
fn enable_hypercall_exits(fd: &VmFd) {
    let mask = fd.check_extension_int(Cap::ExitHypercall);
    if mask > 0 {
        let mut enable = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
        enable.args[0] = mask as u64;
        // Without it the kernel answers "unknown" itself.
        let _ = fd.enable_cap(&enable);
    }
}

/// A virtual machine of engine `kvm`.
pub struct KvmVm {
    shared: Arc<VmShared>,
    kvmclock: Arc<KvmClock>,
    irqchip: IrqChip,
    doorbells: Mutex<Doorbells>,
    irqfds: Mutex<Irqfds>,
    config: Config,
    created: Mutex<Vec<u32>>,
}

impl KvmVm {
    /// As the contract's `create_vcpu`, with what KVM's vCPUs can do besides.
    pub fn create_kvm_vcpu(&self, id: u32) -> Result<KvmVcpu, EngineError> {
        if id >= self.config.topology.vcpus() {
            return Err(EngineError::Refused(format!(
                "vCPU {id} does not exist: the VM has {}",
                self.config.topology.vcpus()
            )));
        }
        let mut created = self.created.lock();
        if created.contains(&id) {
            return Err(EngineError::Refused(format!("vCPU {id} exists already")));
        }
        let vcpu = KvmVcpu::new(id, Arc::clone(&self.shared))?;
        created.push(id);
        Ok(vcpu)
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.create_kvm_vcpu(id)?))
    }

    fn irq_line(&self, gsi: u32, level: bool) {
        // Fails for a line that is wired to nothing, which has no effect on a PC.
        let _ = self.shared.fd.set_irq_line(gsi, level);
    }

    fn msi(&self, address: u64, data: u32) {
        irqchip::signal_msi(&self.shared.fd, Msi { address, data });
    }

    fn set_msi_routes(&self, routes: &[(u32, Option<Msi>)]) -> Result<(), EngineError> {
        self.irqchip.change_routes(&self.shared.fd, routes)
    }

    fn add_irqfd(
        &self,
        gsi: u32,
        event: BorrowedFd<'_>,
        resample: Option<BorrowedFd<'_>>,
    ) -> Result<IrqfdId, EngineError> {
        let mut irqfds = self.irqfds.lock();
        let (id, irqfd) = irqfds.add(Irqfd::new(gsi, event, resample)?)?;
        eventfd::add_irqfd(&self.shared.fd, &irqfd).inspect_err(|_| {
            let _ = irqfds.remove(id);
        })?;
        Ok(id)
    }

    fn remove_irqfd(&self, irqfd: IrqfdId) -> Result<(), EngineError> {
        let irqfd = self.irqfds.lock().remove(irqfd)?;
        eventfd::remove_irqfd(&self.shared.fd, &irqfd)
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: BorrowedFd<'_>) -> Result<(), EngineError> {
        let VmShared { fd, memory, platform, .. } = &*self.shared;
        let mut doorbells = self.doorbells.lock();
        let event = doorbells.add(doorbell, event, memory, platform)?;
        eventfd::add_doorbell(fd, &doorbell, event.as_fd()).inspect_err(|_| {
            let _ = doorbells.remove(&doorbell);
        })
    }

    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        let event = self.doorbells.lock().remove(doorbell)?;
        eventfd::remove_doorbell(&self.shared.fd, doorbell, event.as_fd())
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let VmShared { supported, policy, platform, cpu, .. } = &*self.shared;
        let Ok(table) = cpuid::table(supported, *policy, platform, cpu, 0) else {
            return [0; 4];
        };
        let found = table.as_slice().iter().find(|e| (e.function, e.index) == (leaf, subleaf));
        found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    fn tsc_hz(&self) -> u64 {
        self.shared.tsc_hz()
    }

    fn clock(&self) -> &Arc<Clock> {
        &self.shared.clock
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        let VmShared { fd, slots, .. } = &*self.shared;
        slots.set_logging(fd, on)?;
        if on { Ok(()) } else { slots.take_dirty(fd).map(drop) }
    }

    fn take_dirty_log(&self) -> Result<Vec<DirtyPages>, EngineError> {
        self.shared.slots.take_dirty(&self.shared.fd)
    }

    fn save(&self) -> Result<VmState, EngineError> {
        let VmShared { fd, clock, .. } = &*self.shared;
        let clock_ns = clock.now_ns();
        Ok(VmState {
            vcpus: self.config.topology.vcpus(),
            clock_ns,
            kvmclock_ns: self.kvmclock.read(&self.shared)?,
            tsc_hz: self.shared.tsc_hz(),
            chipset: chipset::save(fd, clock_ns)?,
        })
    }

    fn load(&self, state: &VmState) -> Result<(), EngineError> {
        state.check(self.config.topology.vcpus(), self.shared.tsc_hz())?;
        chipset::load(&self.shared.fd, &state.chipset)?;
        self.irqfds.lock().iter().for_each(|irqfd| irqfd.signal_resample());
        self.shared.clock.set_ns(state.clock_ns);
        self.kvmclock.set(&self.shared, state.kvmclock_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_vcpus_are_refused_with_the_limit() {
        let error = check_vcpus(9, 4).unwrap_err().to_string();
        assert!(error.contains("1 to 4") && error.contains("at most 4 CPUs"), "{error}");
        assert!(check_vcpus(0, 4).is_err() && check_vcpus(4, 4).is_ok());
    }

    #[test]
    fn vm_on_a_device_that_is_not_kvm_is_refused() {
        let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
        let config = Config { device: "/dev/null".into(), ..Config::default() };
        let error = create_vm(memory, config).err().unwrap().to_string();
        assert!(error.contains("is not KVM"), "{error}");
    }
}
