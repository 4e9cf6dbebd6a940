//! `tetrarch._native.confine_*`: what a process that runs a machine gives up.

use std::path::PathBuf;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use tetrarch_confine::{ConfineError, Confinement, FileAccess, Needs};

pub fn prepare(unix_sockets: bool, socket_directories: Vec<PathBuf>) -> PyResult<bool> {
    let needs = Needs { unix_sockets, socket_directories };
    Ok(Confinement::prepare(needs).map_err(refused)?.has_network())
}

pub fn enter(grants: Vec<(PathBuf, String)>, children: Vec<u32>) -> PyResult<()> {
    let confinement = Confinement::get()
        .ok_or_else(|| PyValueError::new_err("the process is not prepared for it"))?;
    let grants = grants
        .into_iter()
        .map(|(path, access)| Ok((path, access_of(&access)?)))
        .collect::<PyResult<Vec<_>>>()?;
    confinement.enter_control(&grants, &children).map_err(refused)
}

fn access_of(name: &str) -> PyResult<FileAccess> {
    match name {
        "read" => Ok(FileAccess::Read),
        "write" => Ok(FileAccess::Write),
        "remove" => Ok(FileAccess::Remove),
        "remove directories" => Ok(FileAccess::RemoveDirectories),
        "sockets" => Ok(FileAccess::Sockets),
        _ => Err(PyValueError::new_err(format!("there is no access {name:?}"))),
    }
}

fn refused(error: ConfineError) -> PyErr {
    PyOSError::new_err(error.to_string())
}
