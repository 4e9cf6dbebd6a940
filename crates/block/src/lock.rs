//! The lock that keeps two writers off one image, between our own machines and QEMU's.
//!
//! QEMU's protocol (block/file-posix.c, raw_check_lock_bytes and raw_apply_lock_bytes):
//! who uses a file takes *shared* locks of single bytes. Byte 100 + n says "I use
//! permission n", byte 200 + n "I do not let others use permission n". After taking its
//! own, it looks whether anybody holds a byte that speaks against it. The locks are
//! those of the open file description (fcntl(2), F_OFD_SETLK), which end with it.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

const USES: i64 = 100;
const REFUSES: i64 = 200;

/// Numbers of permissions: include/block/block-common.h, BLK_PERM_*.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Takes the locks of a reader or of a writer for as long as `file` is open. Neither
/// lets others write. `Ok(false)` is a file system without such locks.
pub(crate) fn lock(file: &File, writes: bool) -> Result<bool, Errno> {
    let uses: &[i64] = if writes { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let refuses = [WRITE, RESIZE];
    let mine = uses.iter().map(|n| USES + n).chain(refuses.map(|n| REFUSES + n));
    for byte in mine {
        match fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => {}
            // NFS without a lock daemon, FUSE without locks.
            Err(Errno::NOLCK | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(false),
            Err(errno) => return Err(errno),
        }
    }
    let against = uses.iter().map(|n| REFUSES + n).chain(refuses.map(|n| USES + n));
    for byte in against {
        // Whether an exclusive lock could be had: not while anybody else holds it.
        let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
        if found != libc::F_UNLCK {
            return Err(Errno::AGAIN);
        }
    }
    Ok(true)
}

fn fcntl(file: &File, command: i32, kind: i32, byte: i64) -> Result<i32, Errno> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // fcntl(2): must be 0 for locks of open file descriptions.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as the borrow of `file`, and both commands
    // take a `struct flock`, which lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(i32::from(lock.l_type))
}
