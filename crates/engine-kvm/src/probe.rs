//! What this host's KVM is worth, by running a guest on it.
//!
//! Some hosts offer a /dev/kvm with nothing behind it: KVM then interprets the
//! guest's instructions one by one, thousands of times slower than a CPU does.
//! No capability says so. The probe times a loop in the guest against the same
//! loop here: with virtualization in hardware they take the same time, on any
//! host, nested ones included.

use std::arch::asm;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use tetrarch_engine::Unusable;

use crate::host;

/// What the probe saw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probe {
    /// Why KVM cannot be used, if it cannot.
    pub reason: Option<Unusable>,
    /// The guest of ten instructions came to its end with the right result.
    pub runs: bool,
    /// Instructions a second, of the guest and of the host in the same loop.
    pub guest_rate: f64,
    pub host_rate: f64,
    pub max_vcpus: u32,
    /// The host is a guest itself.
    pub nested: bool,
    /// What the whole probe took.
    pub took: Duration,
}

/// A guest this much slower than the host is not run by the host's CPU; engine
/// `bt` is faster then. Hardware gives 1; KVM's interpreter less than 1/100.
const HARDWARE_SHARE: f64 = 0.2;

impl Probe {
    pub fn hardware_backed(&self) -> bool {
        self.runs && self.guest_rate >= HARDWARE_SHARE * self.host_rate
    }
}

/// The loop of two instructions runs so often: first to see whether it crawls
/// (1 ms at 2 million instructions a second), then long enough to time.
const SHORT_LOOP: u64 = 1_000;
const LONG_LOOP: u64 = 3_000_000;
/// The short loop takes a microsecond in hardware and a millisecond without.
const CRAWL: Duration = Duration::from_micros(400);
/// The best of so many runs counts: others may want the CPU meanwhile.
const TRIES: usize = 3;

/// All guest memory: page tables, then code, then data.
const PAGE: usize = 0x1000;
const PML4: u64 = 0x0000;
const PDPT: u64 = 0x1000;
const DIRECTORY: u64 = 0x2000;
const CODE: u64 = 0x3000;
const DATA: u64 = 0x4000;
const MEMORY: usize = 5 * PAGE;

const PORT: u16 = 0x80;
const RESULT: u32 = 0x2345;

/// Ten instructions, in 64-bit mode; RCX counts the loop.
const GUEST: [u8; 37] = [
    0xB8, 0x34, 0x12, 0x00, 0x00, // mov eax, 0x1234
    0xBB, 0x11, 0x11, 0x00, 0x00, // mov ebx, 0x1111
    0x01, 0xD8, // add eax, ebx
    0x89, 0x04, 0x25, 0x00, 0x40, 0x00, 0x00, // mov [0x4000], eax
    0x8B, 0x14, 0x25, 0x00, 0x40, 0x00, 0x00, // mov edx, [0x4000]
    0x89, 0xD0, // mov eax, edx
    0xFF, 0xC9, // loop: dec ecx
    0x75, 0xFC, // jnz loop
    0xE7, 0x80, // out 0x80, eax
    0xF4, // hlt
    0xEB, 0xFD, // jmp back to hlt
];

/// Looks at `device` and runs the guest on it.
pub fn probe(device: &str) -> Probe {
    let start = Instant::now();
    let mut probe =
        Probe { nested: tetrarch_engine::cpuid::host(1, 0)[2] >> 31 != 0, ..Probe::default() };
    if let Err(reason) = run_probe(device, &mut probe) {
        probe.reason = Some(reason);
    }
    probe.took = start.elapsed();
    probe
}

fn run_probe(device: &str, probe: &mut Probe) -> Result<(), Unusable> {
    let kvm = host::open(device)?;
    probe.max_vcpus = kvm.get_max_vcpus() as u32;
    let mut guest = Guest::new(&kvm)?;
    guest.run(1)?;
    probe.runs = true;
    // The way in and out counts for neither side.
    let entry = best(|| guest.run(1))?;
    let short = best(|| guest.run(SHORT_LOOP))?.saturating_sub(entry);
    probe.host_rate = rate(LONG_LOOP, best(|| Ok(host_loop(LONG_LOOP)))?);
    probe.guest_rate = if short > CRAWL {
        rate(SHORT_LOOP, short)
    } else {
        rate(LONG_LOOP, best(|| guest.run(LONG_LOOP))?.saturating_sub(entry))
    };
    Ok(())
}

fn best(mut run: impl FnMut() -> Result<Duration, Unusable>) -> Result<Duration, Unusable> {
    let mut best = run()?;
    for _ in 1..TRIES {
        best = best.min(run()?);
    }
    Ok(best)
}

fn rate(loops: u64, took: Duration) -> f64 {
    (loops * 2) as f64 / took.as_secs_f64().max(1e-9)
}

/// The guest's loop on the host's CPU.
fn host_loop(loops: u64) -> Duration {
    let start = Instant::now();
    // SAFETY: counts a register down.
    unsafe {
        asm!("2:", "dec {0:e}", "jnz 2b", inout(reg) loops => _, options(nomem, nostack));
    }
    start.elapsed()
}

/// Anonymous memory of the guest.
struct Memory(*mut u8);

impl Memory {
    fn new() -> Result<Self, Unusable> {
        // SAFETY: a fresh anonymous mapping.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Unusable::new("the host gives no 20 KiB of memory", "free some"));
        }
        let memory = Self(address.cast());
        let entry = |to: u64, flags: u64| (to | flags).to_le_bytes();
        // Present, writable; the directory maps 2 MiB at once (Intel SDM 3A, 4.5.4).
        memory.write(PML4, &entry(PDPT, 3));
        memory.write(PDPT, &entry(DIRECTORY, 3));
        memory.write(DIRECTORY, &entry(0, 0x83));
        memory.write(CODE, &GUEST);
        debug_assert!(DATA as usize + PAGE <= MEMORY);
        Ok(memory)
    }

    fn write(&self, at: u64, data: &[u8]) {
        let at = at as usize;
        if at + data.len() <= MEMORY {
            // SAFETY: within the mapping.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.0.add(at), data.len()) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; the VM that used it is gone.
        unsafe { libc::munmap(self.0.cast(), MEMORY) };
    }
}

struct Guest {
    // Dropped in this order: the VM before its memory.
    vcpu: VcpuFd,
    _vm: kvm_ioctls::VmFd,
    _memory: Memory,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, Unusable> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error| crate::error::unusable(&what, error)
        };
        let memory = Memory::new()?;
        let vm = kvm.create_vm().map_err(failed("make a virtual machine"))?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.0 as u64,
        };
        // SAFETY: the mapping outlives the VM: see the order of the fields.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed("map guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("make a vCPU"))?;
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("say what its CPUs can do"))?;
        // Long mode must be announced before EFER can ask for it.
        vcpu.set_cpuid2(&supported).map_err(failed("set what the CPU says it is"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs the guest from its start to its HLT.
    fn run(&mut self, loops: u64) -> Result<Duration, Unusable> {
        let failed = |error| crate::error::unusable("set registers", error);
        let mut sregs = self.vcpu.get_sregs().map_err(failed)?;
        // Flat segments (Intel SDM 3A, 3.4.5): code 64-bit, data writable.
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 0xB,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 = 0x8000_0011; // PG, ET, PE
        sregs.cr3 = PML4;
        sregs.cr4 = 1 << 5; // PAE
        sregs.efer = 1 << 8 | 1 << 10; // LME, LMA
        self.vcpu.set_sregs(&sregs).map_err(failed)?;
        let regs =
            kvm_bindings::kvm_regs { rip: CODE, rcx: loops, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(failed)?;
        let start = Instant::now();
        let mut result = None;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, data)) => {
                    result = Some((start.elapsed(), data == RESULT.to_le_bytes()));
                }
                Ok(VcpuExit::Hlt) => break,
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == libc::EINTR => {}
                other => {
                    return Err(wrong(format!("a small guest did not run: {other:?}")));
                }
            }
        }
        match result {
            Some((took, true)) => Ok(took),
            Some((_, false)) => Err(wrong("a small guest computed something wrong")),
            None => Err(wrong("a small guest ended before its time")),
        }
    }
}

/// KVM is there and does not do what it should.
fn wrong(cause: impl Into<String>) -> Unusable {
    Unusable::new(cause, "use engine bt")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_loads_its_data_from_where_it_lies() {
        assert_eq!(GUEST[15..19], (DATA as u32).to_le_bytes());
        assert_eq!(GUEST[22..26], (DATA as u32).to_le_bytes());
    }

    #[test]
    fn device_that_is_not_kvm_has_a_reason() {
        let probe = probe("/dev/null");
        assert!(!probe.runs && !probe.hardware_backed());
        assert!(probe.reason.unwrap().cause.contains("is not KVM"));
    }

    #[test]
    fn crawling_guest_is_not_hardware_backed() {
        let mut probe = Probe { runs: true, guest_rate: 2e6, host_rate: 3e9, ..Probe::default() };
        assert!(!probe.hardware_backed());
        probe.guest_rate = 2.5e9;
        assert!(probe.hardware_backed());
    }
}
