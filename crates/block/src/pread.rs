//! A raw disk by system calls that wait: for a host without io_uring.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use crate::raw::RawFile;
use crate::transfer::{By, Operation, Transfer};
use crate::workers::Blocking;
use crate::{BlockError, BlockInfo, Request};

impl Blocking for RawFile {
    fn info(&self) -> BlockInfo {
        self.info()
    }

    fn serve(&self, request: &Request) -> Result<(), BlockError> {
        let mut transfer = match Transfer::new(self, request.clone()) {
            Ok(transfer) => transfer,
            Err(result) => return result,
        };
        loop {
            let result = call(self, &transfer.operation(self));
            if let Some(result) = transfer.step(self, result) {
                return result;
            }
        }
    }
}

fn call(file: &RawFile, operation: &Operation) -> Result<u64, Errno> {
    let fd = |by: &By| match (&file.direct, by) {
        (Some((direct, _)), By::Direct) => direct.as_raw_fd(),
        _ => file.file.as_raw_fd(),
    };
    match operation {
        // SAFETY: the iovecs point to guest memory that the transfer's list keeps.
        Operation::Read(by, iovecs, offset) => returned(unsafe {
            libc::preadv(fd(by), iovecs.as_ptr(), iovecs.len() as i32, *offset as i64)
        }),
        // SAFETY: as above.
        Operation::Write(by, iovecs, offset) => returned(unsafe {
            libc::pwritev(fd(by), iovecs.as_ptr(), iovecs.len() as i32, *offset as i64)
        }),
        Operation::WriteBytes(bytes, offset) => {
            rustix::io::pwrite(file.file.as_fd(), bytes, *offset).map(|bytes| bytes as u64)
        }
        Operation::Allocate(mode, offset, length) => {
            rustix::fs::fallocate(&file.file, *mode, *offset, *length).map(|()| 0)
        }
        Operation::Sync => rustix::fs::fdatasync(&file.file).map(|()| 0),
    }
}

fn returned(result: isize) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}
