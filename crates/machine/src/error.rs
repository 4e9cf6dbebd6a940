use tetrarch_bus::AttachError;
use tetrarch_engine::EngineError;
use tetrarch_memory::MemoryError;

/// Why a machine cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Attach(#[from] AttachError),
}
