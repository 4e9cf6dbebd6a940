//! `tetrarch._native.Disk` and what the tools do with images.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCFunction, PyDict};
use tetrarch_block::{
    BlockBackend, BlockError, Cache, Counted, Format, ImageError, ImageOptions, Limits, NewImage,
    OnError, Operation, Qcow2Header, Source, StopOnError, Target, Throttled, Waited, Waits,
    backing_path,
};
use tetrarch_memory::GuestMemory;

use crate::descriptor::own_descriptor;
use crate::error::Failure;

pyo3::create_exception!(
    tetrarch._native,
    DiskError,
    pyo3::exceptions::PyException,
    "A disk image that cannot be used: with its path, the cause, and what mends it."
);

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Python(Python::attach(|py| {
            let exception = DiskError::new_err(error.to_string());
            let value = exception.value(py);
            let fields = value
                .setattr("path", error.path.display().to_string())
                .and_then(|()| value.setattr("cause", error.cause))
                .and_then(|()| value.setattr("mend", error.mend));
            fields.map_or_else(|failed| failed, |()| exception)
        }))
    }
}

fn kind(name: Option<&str>) -> Result<Option<Format>, Failure> {
    let parse = |name: &str| name.parse::<Format>().map_err(Failure::refused);
    name.map(parse).transpose()
}

/// A disk behind a controller.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct Disk(Mutex<Option<Arc<dyn BlockBackend>>>);

impl Disk {
    pub fn backend(&self) -> Result<Arc<dyn BlockBackend>, Failure> {
        self.0.lock().clone().ok_or_else(|| Failure::refused("the disk is closed"))
    }
}

#[pymethods]
impl Disk {
    #[new]
    #[pyo3(signature = (
        path, *, image_format = None, readonly = false, direct = false, snapshot = false, iops = None,
        bps = None, on_stop = None, on_error = None, files = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "options, by their names")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        image_format: Option<&str>,
        readonly: bool,
        direct: bool,
        snapshot: bool,
        iops: Option<u64>,
        bps: Option<u64>,
        on_stop: Option<Py<PyAny>>,
        on_error: Option<Py<PyAny>>,
        files: Option<Vec<i32>>,
    ) -> Result<Self, Failure> {
        let cache = if direct { Cache::None } else { Cache::Writeback };
        let format = kind(image_format)?;
        let options = ImageOptions { format, readonly, cache, snapshot };
        let mut disk = match files {
            None => py.detach(|| tetrarch_block::open(&path, options))?,
            Some(numbers) => {
                let own = |number| own_descriptor(number).map(File::from);
                let files = numbers.into_iter().map(own).collect::<Result<_, _>>()?;
                py.detach(|| tetrarch_block::open_handed(&path, files, options))?
            }
        };
        if iops.is_some() || bps.is_some() {
            disk = Box::new(Throttled::new(disk, Limits { iops, bps }));
        }
        if let Some(call) = on_stop {
            disk = Box::new(StopOnError::new(disk, Arc::new(stop_hook(call))));
        }
        let disk = Counted::new(disk, on_error.map(error_hook));
        Ok(Self(Mutex::new(Some(Arc::new(disk)))))
    }

    /// In bytes.
    #[getter]
    fn size(&self, py: Python<'_>) -> Result<u64, Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.info().size))
    }

    #[getter]
    fn block_size(&self, py: Python<'_>) -> Result<u32, Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.info().block_size))
    }

    #[getter]
    fn readonly(&self, py: Python<'_>) -> Result<bool, Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.info().readonly))
    }

    #[getter]
    fn discard_granularity(&self, py: Python<'_>) -> Result<u32, Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.info().discard_granularity))
    }

    fn resize(&self, py: Python<'_>, size: u64) -> Result<(), Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.resize(size))?)
    }

    /// Waits until all that was written is durable.
    fn flush(&self, py: Python<'_>) -> Result<(), Failure> {
        let disk = self.backend()?;
        Ok(py.detach(|| disk.flush()).map_err(os_error)?)
    }

    /// Its bytes, for a device that waits for them.
    fn access(&self, py: Python<'_>) -> Result<DiskBytes, Failure> {
        let disk = self.backend()?;
        let queue = py.detach(|| disk.open_queue())?;
        let buffer = GuestMemory::new(Waited::STEP as u64)?;
        Ok(DiskBytes(Mutex::new(Some(Waited::new(queue, buffer)))))
    }

    /// The same disk once more, to be closed on its own.
    fn share(&self) -> Result<Self, Failure> {
        Ok(Self(Mutex::new(Some(self.backend()?))))
    }

    /// Empty once it is closed.
    fn stats(&self) -> BTreeMap<String, u64> {
        let disk = self.0.lock().clone();
        disk.map(|disk| disk.counters()).unwrap_or_default()
    }

    /// Tries writes anew that wait for the host to be mended; none do in a closed disk.
    fn retry(&self, py: Python<'_>) {
        let disk = self.0.lock().clone();
        py.detach(|| disk.inspect(|disk| disk.retry()));
    }

    /// Lets go of the image, unless a controller has the disk too.
    fn close(&self, py: Python<'_>) {
        let disk = self.0.lock().take();
        py.detach(|| drop(disk));
    }
}

/// Reads and writes of a disk that the caller waits for.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct DiskBytes(Mutex<Option<Waited>>);

/// No device that waits asks for more at once.
const BYTES_MAX: usize = 1 << 20;

#[pymethods]
impl DiskBytes {
    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> Result<Bound<'py, PyBytes>, Failure> {
        if length > BYTES_MAX {
            return Err(Failure::refused(format!("{length} bytes at once; at most {BYTES_MAX}")));
        }
        let mut data = vec![0; length];
        py.detach(|| self.waited(|disk| disk.read(offset, &mut data)))?;
        Ok(PyBytes::new(py, &data))
    }

    fn write(&self, py: Python<'_>, offset: u64, data: Vec<u8>) -> Result<(), Failure> {
        Ok(py.detach(|| self.waited(|disk| disk.write(offset, &data)))?)
    }

    /// Lets go of the disk.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.0.lock().take()));
    }
}

impl DiskBytes {
    fn waited(
        &self,
        serve: impl FnOnce(&mut Waited) -> Result<(), BlockError>,
    ) -> std::io::Result<()> {
        let mut disk = self.0.lock();
        let disk = disk.as_mut().ok_or_else(|| std::io::Error::other("the disk is closed"))?;
        serve(disk).map_err(os_error)
    }
}

fn os_error(error: BlockError) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

/// Calls Python with the error's words and what says whether the write still waits, on a
/// thread of its own: it is told on the I/O thread, which waits for nobody.
fn stop_hook(call: Py<PyAny>) -> impl Fn(BlockError, Waits) + Send + Sync {
    let call = Arc::new(call);
    move |error, waits| {
        let call = Arc::clone(&call);
        let tell = move || {
            Python::attach(|py| {
                let still = PyCFunction::new_closure(py, None, None, move |_, _| waits.still());
                let told = still.and_then(|still| call.call1(py, (error.to_string(), still)));
                if let Err(raised) = told {
                    raised.write_unraisable(py, None);
                }
            });
        };
        if let Err(error) = std::thread::Builder::new().name("tetrarch-stop".into()).spawn(tell) {
            log::error!("the host gives no thread to pause the machine: {error}");
        }
    }
}

/// Failures that Python has not heard of yet; who asks for more of them is not told of all.
const FAILURES_MAX: usize = 64;

#[derive(Default)]
struct Failures {
    waiting: VecDeque<(Operation, BlockError)>,
    /// A thread tells them.
    telling: bool,
}

/// Calls Python with each failed request: the operation, whether the host is full, and the
/// error's words. On a thread that is there while there are any.
fn error_hook(call: Py<PyAny>) -> Arc<OnError> {
    let call = Arc::new(call);
    let failures = Arc::<Mutex<Failures>>::default();
    Arc::new(move |operation, error| {
        let mut queue = failures.lock();
        if queue.waiting.len() < FAILURES_MAX {
            queue.waiting.push_back((operation, error));
        }
        if queue.telling {
            return;
        }
        let (call, failures) = (Arc::clone(&call), Arc::clone(&failures));
        let thread = std::thread::Builder::new().name("disk-errors".into());
        match thread.spawn(move || tell_failures(&call, &failures)) {
            Ok(_) => queue.telling = true,
            Err(error) => log::error!("the host gives no thread to tell of disk errors: {error}"),
        }
    })
}

fn tell_failures(call: &Py<PyAny>, failures: &Mutex<Failures>) {
    loop {
        let (operation, error) = {
            let mut queue = failures.lock();
            let Some(next) = queue.waiting.pop_front() else {
                queue.telling = false;
                return;
            };
            next
        };
        let name = match operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Unmap => "unmap",
        };
        let full = error == BlockError::NoSpace;
        Python::attach(|py| {
            if let Err(raised) = call.call1(py, (name, full, error.to_string())) {
                raised.write_unraisable(py, None);
            }
        });
    }
}

/// Makes an image; gives the disk's size.
#[pyfunction]
#[pyo3(signature = (path, image_format, size = None, backing = None, backing_format = None,
    cluster_size = None))]
pub fn disk_create(
    py: Python<'_>,
    path: PathBuf,
    image_format: &str,
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<&str>,
    cluster_size: Option<u64>,
) -> Result<u64, Failure> {
    let format = kind(Some(image_format))?.unwrap_or(Format::Raw);
    let backing_format = kind(backing_format)?;
    Ok(py.detach(|| {
        let backing = match backing {
            None => None,
            Some(name) => {
                let folder = path.parent().unwrap_or(Path::new(""));
                let format = match backing_format {
                    Some(format) => format,
                    None => tetrarch_block::guess_format(&folder.join(&name))?,
                };
                Some((name, format))
            }
        };
        tetrarch_block::create(&path, format, &NewImage { size, backing, cluster_size })
    })?)
}

/// What an image is, without its backing files.
#[pyfunction]
#[pyo3(signature = (path, image_format = None))]
pub fn disk_info<'py>(
    py: Python<'py>,
    path: PathBuf,
    image_format: Option<&str>,
) -> Result<Bound<'py, PyDict>, Failure> {
    let wanted = kind(image_format)?;
    let about = py.detach(|| tetrarch_block::describe(&path, wanted))?;
    let info = PyDict::new(py);
    info.set_item("format", about.format.name())?;
    info.set_item("size", about.size)?;
    info.set_item("allocated", about.allocated)?;
    if let Some(subformat) = about.subformat {
        info.set_item("subformat", subformat)?;
    }
    if let Some(header) = about.qcow2 {
        qcow2_info(&info, &header)?;
        if let Some(Ok(below)) = header.backing.map(|name| backing_path(&path, &name)) {
            info.set_item("backing_path", below)?;
        }
    }
    Ok(info)
}

fn qcow2_info(info: &Bound<'_, PyDict>, header: &Qcow2Header) -> PyResult<()> {
    info.set_item("version", header.version)?;
    info.set_item("cluster_size", header.cluster_size())?;
    info.set_item("backing", header.backing.as_deref())?;
    info.set_item("backing_format", header.backing_format.as_deref())?;
    info.set_item("dirty", header.dirty)?;
    info.set_item("lazy_refcounts", header.lazy_refcounts)?;
    info.set_item("snapshots", header.snapshots)
}

/// An image that is copied into another.
#[pyclass(frozen, module = "tetrarch._native")]
pub struct DiskSource(Source);

#[pymethods]
impl DiskSource {
    #[new]
    #[pyo3(signature = (path, image_format = None))]
    fn new(py: Python<'_>, path: PathBuf, image_format: Option<&str>) -> Result<Self, Failure> {
        let format = kind(image_format)?;
        Ok(Self(py.detach(|| Source::open(&path, format))?))
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    /// Copies into a new image, and tells how many bytes are done. What `progress` raises
    /// ends the copy, and removes what was made. With `stream` a VMDK image is streamOptimized.
    #[pyo3(signature = (path, image_format, progress, stream = false))]
    fn copy(
        &self,
        py: Python<'_>,
        path: PathBuf,
        image_format: &str,
        progress: &Bound<'_, PyAny>,
        stream: bool,
    ) -> Result<(), Failure> {
        let format = kind(Some(image_format))?.unwrap_or(Format::Raw);
        let target = if stream { Target::StreamOptimized } else { Target::Image(format) };
        let progress = progress.clone().unbind();
        let mut raised = None;
        let copied = py.detach(|| {
            self.0.copy(&path, target, |done| {
                let told = Python::attach(|py| {
                    py.check_signals()?;
                    progress.call1(py, (done,)).map(drop)
                });
                raised = told.err();
                raised.is_none()
            })
        });
        match raised {
            Some(raised) => Err(raised.into()),
            None => Ok(copied.map(drop)?),
        }
    }
}

/// Compares a qcow2 image's refcounts with what it refers to.
#[pyfunction]
pub fn disk_check<'py>(
    py: Python<'py>,
    path: PathBuf,
    repair: bool,
) -> Result<Bound<'py, PyDict>, Failure> {
    let found = py.detach(|| tetrarch_block::check(&path, repair))?;
    let report = PyDict::new(py);
    report.set_item("clusters", found.clusters)?;
    report.set_item("leaks", found.leaks)?;
    report.set_item("errors", found.errors)?;
    report.set_item("repaired", found.repaired)?;
    report.set_item("problems", found.problems)?;
    Ok(report)
}
