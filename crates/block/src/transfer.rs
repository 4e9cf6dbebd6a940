//! A request to a raw disk as the operations on its file, one after another: the kernel
//! may do a part, or refuse one way where another is left.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use tetrarch_memory::ScatterList;

use crate::backend::SECTOR;
use crate::raw::RawFile;
use crate::{BlockError, Format, Request};

/// Zeroes that are written where the file system knows no other way, so many at a time.
static ZEROES: Aligned = Aligned([0; 1 << 20]);
#[repr(align(4096))]
struct Aligned([u8; 1 << 20]);

/// How often an operation is begun anew that the kernel had no memory or no time for.
const TRIES: u8 = 100;

/// The file of the page cache, or the one past it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    PageCache,
    Direct,
}

/// One system call on the file. What it points to lives as long as its transfer.
pub(crate) enum Operation<'a> {
    Read(By, &'a [libc::iovec], u64),
    Write(By, &'a [libc::iovec], u64),
    WriteBytes(&'a [u8], u64),
    Allocate(FallocateFlags, u64, u64),
    Sync,
}

pub(crate) struct Transfer {
    request: Request,
    /// The first sector of a disk that was taken for raw by its first bytes: what was looked at
    /// is what is written, whatever the guest makes of its memory meanwhile.
    head: Option<Box<[u8]>>,
    /// What is left of the memory after a short read or write.
    rest: Option<Box<ScatterList>>,
    /// Bytes that are done.
    done: u64,
    /// O_DIRECT has refused it.
    no_direct: bool,
    /// How the kernel is asked for zeroes; without it they are written.
    mode: Option<FallocateFlags>,
    tries: u8,
}

impl Transfer {
    /// `Err` is a request that is done, or refused, without an operation.
    pub fn new(file: &RawFile, request: Request) -> Result<Self, Result<(), BlockError>> {
        request.check(&file.info()).map_err(Err)?;
        let head = match &request {
            Request::Write { offset: 0, data } if file.guessed => {
                let mut first = vec![0; data.len().min(SECTOR) as usize];
                data.read_at(0, &mut first);
                if Format::of(&first) != Format::Raw {
                    return Err(Err(BlockError::LooksLikeAnImage));
                }
                Some(first.into_boxed_slice())
            }
            _ => None,
        };
        let mode = match request {
            Request::Discard { .. } => Some(file.zero_mode(true).ok_or(Ok(()))?),
            Request::WriteZeroes { unmap, .. } => file.zero_mode(unmap),
            _ => None,
        };
        if request.range().1 == 0 && !matches!(request, Request::Flush) {
            return Err(Ok(()));
        }
        Ok(Self { request, head, rest: None, done: 0, no_direct: false, mode, tries: 0 })
    }

    /// The operation that is due.
    pub fn operation(&self, file: &RawFile) -> Operation<'_> {
        let (offset, length) = self.request.range();
        let (offset, left) = (offset + self.done, length - self.done);
        let transfer = |data: &'_ ScatterList| {
            let iovecs = data.iovecs();
            let direct = !self.no_direct && file.takes_direct(offset, iovecs);
            if direct { By::Direct } else { By::PageCache }
        };
        match &self.request {
            Request::Read { data, .. } => {
                let data = self.rest.as_deref().unwrap_or(data);
                Operation::Read(transfer(data), data.iovecs(), offset)
            }
            Request::Write { data, .. } => {
                let head = self.head.as_ref().and_then(|head| head.get(self.done as usize..));
                if let Some(head) = head.filter(|head| !head.is_empty()) {
                    return Operation::WriteBytes(head, offset);
                }
                let data = self.rest.as_deref().unwrap_or(data);
                Operation::Write(transfer(data), data.iovecs(), offset)
            }
            Request::Flush => Operation::Sync,
            Request::Discard { .. } | Request::WriteZeroes { .. } => match self.mode {
                Some(mode) => Operation::Allocate(mode, offset, left),
                None => {
                    let len = left.min(ZEROES.0.len() as u64) as usize;
                    Operation::WriteBytes(&ZEROES.0[..len], offset)
                }
            },
        }
    }

    /// What follows from the operation's result, in bytes: the request's result, or
    /// `None` where another operation is due.
    pub fn step(
        &mut self,
        file: &RawFile,
        result: Result<u64, Errno>,
    ) -> Option<Result<(), BlockError>> {
        let ended = self.after(file, result);
        if let (Some(_), Request::Read { data, .. }) = (&ended, &self.request) {
            // Of a read that failed a part may be there.
            data.written(data.len());
        }
        ended
    }

    fn after(
        &mut self,
        file: &RawFile,
        result: Result<u64, Errno>,
    ) -> Option<Result<(), BlockError>> {
        if matches!(result, Err(Errno::INTR | Errno::AGAIN)) && self.tries < TRIES {
            self.tries += 1;
            return None;
        }
        match &self.request {
            Request::Read { offset, data } | Request::Write { offset, data } => {
                let bytes = match result {
                    Ok(bytes) => bytes,
                    // The file system asks for more than it said.
                    Err(Errno::INVAL) if file.direct.is_some() && !self.no_direct => {
                        self.no_direct = true;
                        return None;
                    }
                    Err(errno) => return Some(Err(errno.into())),
                };
                self.done += bytes;
                let left = data.len().saturating_sub(self.done);
                if left == 0 {
                    return Some(Ok(()));
                }
                if bytes == 0 {
                    // The end of the file, or of the device.
                    return Some(if self.request.writes() {
                        Err(BlockError::NoSpace)
                    } else if file.is_padding(offset + self.done) {
                        data.zero(self.done, left);
                        Ok(())
                    } else {
                        Err(BlockError::Truncated)
                    });
                }
                self.rest = Some(Box::new(data.part(self.done, left)));
                None
            }
            Request::Flush => Some(file.flushed(result.map(drop))),
            Request::Discard { length, .. } | Request::WriteZeroes { length, .. } => {
                let hint = matches!(self.request, Request::Discard { .. });
                match (self.mode, result) {
                    (Some(_), Ok(_)) => Some(Ok(())),
                    (Some(mode), Err(errno)) if file.refused(mode, errno) => {
                        if hint {
                            return Some(Ok(()));
                        }
                        // Of a device: not a multiple of its blocks.
                        let other = file.zero_mode(false).filter(|&other| other != mode);
                        self.mode = other.filter(|_| errno != Errno::INVAL);
                        None
                    }
                    (None, Ok(0)) => Some(Err(BlockError::NoSpace)),
                    (None, Ok(bytes)) => {
                        self.done += bytes;
                        (self.done >= *length).then_some(Ok(()))
                    }
                    (_, Err(errno)) => Some(Err(errno.into())),
                }
            }
        }
    }
}
