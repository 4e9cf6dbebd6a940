//! `tetrarch._native`: the Rust core as Python sees it.
//!
//! The only crate that knows Python. `src/tetrarch/_native.pyi` says what is
//! promised; each file here is one noun of it.

mod ahci;
mod ata;
mod balloon;
mod confine;
mod console;
mod debug;
mod descriptor;
mod device_memory;
mod disk;
mod display;
mod e1000;
mod error;
mod guest_call;
mod ide;
mod irq;
mod kvm;
mod lent;
mod msix;
mod net;
mod nvme;
mod pvscsi;
mod python_device;
mod python_platform;
mod recording;
mod region;
mod replay;
mod rust_device;
mod saved;
mod serial_port;
mod vcpu;
mod vhost_user;
mod virtio;
mod vm;
mod vmci;
mod vmxnet3;
mod vsock;
mod xen;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::ahci::AhciPorts;
    #[pymodule_export]
    use crate::balloon::VirtioBalloon;
    #[pymodule_export]
    use crate::console::VirtioConsole;
    #[pymodule_export]
    use crate::device_memory::DeviceMemory;
    #[pymodule_export]
    use crate::disk::{Disk, DiskBytes, DiskError, DiskSource, disk_check, disk_create, disk_info};
    #[pymodule_export]
    use crate::display::PixelFormat;
    #[pymodule_export]
    use crate::e1000::E1000Rings;
    #[pymodule_export]
    use crate::error::{EngineError, GuestFault, GuestMemoryError};
    #[pymodule_export]
    use crate::guest_call::{GuestCall, GuestTrap, RegisterPortAccess};
    #[pymodule_export]
    use crate::ide::IdeChannels;
    #[pymodule_export]
    use crate::irq::{Intx, IrqSource};
    #[pymodule_export]
    use crate::lent::{VirtioChain, VirtioServed};
    #[pymodule_export]
    use crate::msix::{MsiVectors, MsixTable};
    #[pymodule_export]
    use crate::net::{Network, VirtioNet};
    #[pymodule_export]
    use crate::nvme::NvmeQueues;
    #[pymodule_export]
    use crate::pvscsi::PvscsiRings;
    #[pymodule_export]
    use crate::recording::recorded_configuration;
    #[pymodule_export]
    use crate::region::Region;
    #[pymodule_export]
    use crate::replay::Replay;
    #[pymodule_export]
    use crate::rust_device::{Latch, NullPort, RustDevice};
    #[pymodule_export]
    use crate::serial_port::SerialPort;
    #[pymodule_export]
    use crate::vcpu::Vcpu;
    #[pymodule_export]
    use crate::vhost_user::{VhostUserBackEnd, VhostUserDevice};
    #[pymodule_export]
    use crate::virtio::{Interrupt, IsrStatus, VirtioBlk, VirtioDevice, VirtioRng};
    #[pymodule_export]
    use crate::vm::Vm;
    #[pymodule_export]
    use crate::vmci::VmciDevice;
    #[pymodule_export]
    use crate::vmxnet3::{Vmxnet3Causes, Vmxnet3Rings};
    #[pymodule_export]
    use crate::vsock::VirtioVsock;
    #[pymodule_export]
    use crate::xen::XenDomain;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // What the crates below log goes through Python's logging. Levels are not
        // cached: they may change at any time, and there are few messages.
        let logger = pyo3_log::Logger::new(module.py(), pyo3_log::Caching::Loggers)?;
        // Only a second import of the module, by another interpreter, is refused.
        let _ = logger.install();
        // One that is raised without them, from Python, has them too.
        let error = module.py().get_type::<crate::error::EngineError>();
        error.setattr("cause", "")?;
        error.setattr("mend", "")?;
        let error = module.py().get_type::<crate::disk::DiskError>();
        for field in ["path", "cause", "mend"] {
            error.setattr(field, "")?;
        }
        module.add("BT_MAX_VCPUS", tetrarch_machine::BT_MAX_VCPUS)?;
        module.add("LOW_RAM_END", tetrarch_memory::LOW_RAM_END)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }

    /// From here on threads of this process are confined as they start; whether they go into a
    /// network with nothing in it.
    #[pyfunction]
    fn confine_prepare(
        unix_sockets: bool,
        socket_directories: Vec<std::path::PathBuf>,
    ) -> PyResult<bool> {
        crate::confine::prepare(unix_sockets, socket_directories)
    }

    /// Confines the calling thread and those that it makes.
    #[pyfunction]
    fn confine_control(
        grants: Vec<(std::path::PathBuf, String)>,
        children: Vec<u32>,
    ) -> PyResult<()> {
        crate::confine::enter(grants, children)
    }

    #[pyfunction]
    fn own_user_namespace() -> std::io::Result<()> {
        tetrarch_confine::own_user_namespace()
    }

    #[pyfunction]
    fn landlock_version() -> i32 {
        tetrarch_confine::landlock_version()
    }

    /// The answer to a challenge of VNC's authentication.
    #[pyfunction]
    fn vnc_answer(password: &[u8], challenge: [u8; 16]) -> [u8; 16] {
        tetrarch_display::answer(password, challenge)
    }

    /// A block of LZ4 that is `most` bytes or less when it is unpacked.
    #[pyfunction]
    fn unpack_lz4_block<'py>(
        py: Python<'py>,
        block: &[u8],
        most: usize,
    ) -> PyResult<Bound<'py, pyo3::types::PyBytes>> {
        let mut unpacked = vec![0; most];
        let length = lz4_flex::block::decompress_into(block, &mut unpacked)
            .map_err(|error| pyo3::exceptions::PyValueError::new_err(error.to_string()))?;
        Ok(pyo3::types::PyBytes::new(py, &unpacked[..length]))
    }

    /// None if the engine can run here, else why not and what mends it.
    #[pyfunction]
    fn engine_available(name: &str) -> Option<(String, String)> {
        let reason = tetrarch_machine::engine_available(name).err()?;
        Some((reason.cause, reason.mend))
    }

    /// Words of CPUID that the host's own CPU has, as a VM's are named.
    #[pyfunction]
    fn host_cpu_features() -> Vec<(String, u32)> {
        tetrarch_engine::features(tetrarch_engine::cpuid::host)
    }

    /// What the KVM behind a device is worth, by running a small guest on it.
    #[pyfunction]
    #[pyo3(signature = (device = "/dev/kvm"))]
    fn kvm_probe<'py>(py: Python<'py>, device: &str) -> PyResult<Bound<'py, pyo3::types::PyDict>> {
        crate::kvm::kvm_probe(py, device)
    }

    /// The optional parts of KVM; empty where it cannot be opened.
    #[pyfunction]
    #[pyo3(signature = (device = "/dev/kvm"))]
    fn kvm_capabilities(device: &str) -> Vec<(&'static str, bool, &'static str)> {
        crate::kvm::kvm_capabilities(device)
    }
}
