use tetrarch_bus::AttachError;
use tetrarch_engine::EngineError;
use tetrarch_memory::MemoryError;

use crate::NotHeld;

/// Why a machine cannot be put together, or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("{}; {}", .0.error, .0.mend())]
    Hold(NotHeld),
}

impl From<NotHeld> for MachineError {
    fn from(failed: NotHeld) -> Self {
        Self::Hold(failed)
    }
}
