//! Drives as Python gives them to a controller.

use pyo3::prelude::*;
use tetrarch_storage::DamagedState;
use tetrarch_storage::ata::Drive;

use crate::disk::Disk;
use crate::error::Failure;

/// A drive at an ATA controller.
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
}

impl From<DamagedState> for Failure {
    fn from(error: DamagedState) -> Self {
        Self::refused(error.to_string())
    }
}
