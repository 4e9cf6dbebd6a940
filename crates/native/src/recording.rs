//! Recordings, as files that Python has opened.

use std::fs::File;

use pyo3::prelude::*;
use tetrarch_engine::EngineError;
use tetrarch_journal::{JournalError, Reader, Writer};
use tetrarch_machine::Recording;

use crate::descriptor::own_descriptor;
use crate::error::Failure;

fn failed(error: &JournalError) -> Failure {
    mended(error, "name a file that --record has written")
}

fn mended(error: &JournalError, mend: &str) -> Failure {
    EngineError::Refused(format!("the recording: {error}")).mended_by(mend).into()
}

/// Of a machine: a new file, its configuration and the instructions between checkpoints; or a
/// file to replay.
pub fn recording(
    record: Option<(i32, &str, u64)>,
    replay: Option<i32>,
) -> Result<Option<Recording>, Failure> {
    Ok(match (record, replay) {
        (Some(_), Some(_)) => return Err(Failure::refused("a replay is not recorded again")),
        (Some((file, configuration, checkpoint_every)), None) => {
            let file = File::from(own_descriptor(file)?);
            let writer = Writer::new(file, configuration)
                .map_err(|error| mended(&error, "free the space, or record to another file"))?;
            Some(Recording::Record { writer, checkpoint_every })
        }
        (None, Some(file)) => {
            let file = File::from(own_descriptor(file)?);
            Some(Recording::Replay(Reader::new(file).map_err(|error| failed(&error))?))
        }
        (None, None) => None,
    })
}

/// The configuration in a recording, whose file is at its start before and after.
#[pyfunction]
pub fn recorded_configuration(py: Python<'_>, file: i32) -> Result<String, Failure> {
    let file = File::from(own_descriptor(file)?);
    py.detach(|| Reader::configuration_of(file)).map_err(|error| failed(&error))
}
