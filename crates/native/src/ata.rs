//! Drives as Python gives them to a controller, of ATA or of SCSI.

use pyo3::prelude::*;
use tetrarch_storage::DamagedState;
use tetrarch_storage::ata::Drive;
use tetrarch_storage::scsi::Unit;

use crate::disk::Disk;
use crate::error::Failure;

/// A drive at a controller.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct AtaDrive {
    pub name: String,
    disk: Py<Disk>,
    serial: String,
    cd: bool,
}

impl AtaDrive {
    /// `sata` is for a controller of Serial ATA.
    pub fn open(&self, sata: bool) -> Result<Drive, Failure> {
        let disk = self.disk.get().backend()?;
        Ok(if self.cd {
            Drive::cd(disk, &self.serial, sata)
        } else {
            Drive::disk(disk, &self.serial, sata)
        })
    }

    pub fn unit(&self) -> Result<Unit, Failure> {
        let disk = self.disk.get().backend()?;
        Ok(if self.cd { Unit::cd(disk, &self.serial) } else { Unit::disk(disk, &self.serial) })
    }
}

impl From<DamagedState> for Failure {
    fn from(error: DamagedState) -> Self {
        Self::refused(error.to_string())
    }
}
