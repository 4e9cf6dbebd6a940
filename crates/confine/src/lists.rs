//! Which system calls a thread may make, by its kind. What is in no list fails with EPERM.
//!
//! To a reviewer: nothing here names a file, a host or another process, but where a remark
//! says so. `Vcpu`, `Io` and `Worker` have what was opened before the guest ran; `Control`,
//! where Python steers the machine, also opens files, and Landlock says which (`files.rs`).
//! All threads share one address space: code of a guest's in one of them could bring another
//! to make its calls. So the wall of the process is the sum of these lists.

use libc::*;

use crate::filter::Call;
use crate::filter::When::{
    Always, Bits, Eq, Family, NoBits, OneOf, OwnProcess, PathlessStat, SmallFamily,
};

/// Memory, locks, time, open descriptors, and the end of a thread.
pub(crate) const EVERY: &[Call] = &[
    // Locks, waiting, and time where the vDSO has none.
    Call(SYS_futex, Always),
    Call(SYS_sched_yield, Always),
    Call(SYS_sched_getaffinity, Always),
    Call(SYS_getcpu, Always),
    Call(SYS_clock_gettime, Always),
    Call(SYS_clock_getres, Always),
    Call(SYS_clock_nanosleep, Always),
    Call(SYS_nanosleep, Always),
    Call(SYS_gettimeofday, Always),
    Call(SYS_time, Always),
    Call(SYS_getrandom, Always),
    // Memory, but none that can be executed: no code of a guest's becomes code of ours here.
    Call(SYS_mmap, NoBits(2, PROT_EXEC as u64)),
    Call(SYS_mprotect, NoBits(2, PROT_EXEC as u64)),
    Call(SYS_munmap, Always),
    Call(SYS_mremap, Always),
    Call(SYS_madvise, Always),
    Call(SYS_brk, Always),
    // What is open.
    Call(SYS_read, Always),
    Call(SYS_readv, Always),
    Call(SYS_write, Always),
    Call(SYS_writev, Always),
    // How busy a vCPU's thread is, it reads itself.
    Call(SYS_pread64, Always),
    Call(SYS_close, Always),
    Call(SYS_fstat, Always),
    Call(SYS_newfstatat, PathlessStat),
    // Duplicates and flags; not F_SETOWN and F_SETSIG, by which the kernel signals others.
    Call(
        SYS_fcntl,
        OneOf(
            1,
            &[
                F_DUPFD as u64,
                F_DUPFD_CLOEXEC as u64,
                F_GETFD as u64,
                F_SETFD as u64,
                F_GETFL as u64,
                F_SETFL as u64,
                F_OFD_SETLK as u64,
                F_OFD_SETLKW as u64,
                F_OFD_GETLK as u64,
            ],
        ),
    ),
    // Rings of disks, which were made before and take only reads, writes and flushes of the
    // disk's own files (`block/uring.rs`); a vCPU ends what is in flight.
    Call(SYS_io_uring_enter, Always),
    Call(SYS_eventfd2, Always),
    Call(SYS_timerfd_create, Always),
    Call(SYS_timerfd_settime, Always),
    Call(SYS_poll, Always),
    Call(SYS_ppoll, Always),
    Call(SYS_epoll_create1, Always),
    Call(SYS_epoll_ctl, Always),
    Call(SYS_epoll_wait, Always),
    Call(SYS_epoll_pwait, Always),
    // Sockets that are there; with an address a datagram could go elsewhere.
    Call(SYS_recvfrom, Always),
    Call(SYS_recvmsg, Always),
    Call(SYS_sendto, Eq(4, 0)),
    Call(SYS_sendmsg, Always),
    Call(SYS_shutdown, Always),
    Call(SYS_getsockopt, Always),
    Call(SYS_ioctl, OneOf(1, DESCRIPTOR_IOCTLS)),
    // Signals of this process, and its threads; a thread of another process is none.
    Call(SYS_rt_sigaction, Always),
    Call(SYS_rt_sigprocmask, Always),
    Call(SYS_rt_sigreturn, Always),
    Call(SYS_restart_syscall, Always),
    Call(SYS_sigaltstack, Always),
    Call(SYS_tgkill, OwnProcess(0)),
    Call(SYS_getpid, Always),
    Call(SYS_gettid, Always),
    // A thread, which has the lists of the one that makes it; no process. clone3, whose flags lie
    // in memory, is only let through to a filter that refuses it as missing (`filter.rs`).
    Call(SYS_clone, Bits(0, THREAD_FLAGS)),
    Call(SYS_clone3, Always),
    // What a new thread takes upon itself: less than it has.
    Call(SYS_seccomp, Always),
    Call(SYS_landlock_restrict_self, Always),
    Call(SYS_capget, Always),
    Call(SYS_capset, Always),
    Call(SYS_set_robust_list, Always),
    Call(SYS_rseq, Always),
    Call(SYS_prctl, OneOf(0, &[PR_SET_NAME as u64, PR_SET_NO_NEW_PRIVS as u64])),
    Call(SYS_exit, Always),
    Call(SYS_exit_group, Always),
];

/// Files that are open: not of vCPUs. What a guest asks of a disk is done on other threads.
pub(crate) const FILES: &[Call] = &[
    Call(SYS_preadv, Always),
    Call(SYS_preadv2, Always),
    Call(SYS_pwrite64, Always),
    Call(SYS_pwritev, Always),
    Call(SYS_pwritev2, Always),
    Call(SYS_lseek, Always),
    Call(SYS_fallocate, Always),
    Call(SYS_ftruncate, Always),
    Call(SYS_fsync, Always),
    Call(SYS_fdatasync, Always),
    Call(SYS_sync_file_range, Always),
];

/// A vCPU of engine `bt`: its timer.
pub(crate) const VCPU_BT: &[Call] = &[
    Call(SYS_timer_settime, Always),
    Call(SYS_timer_gettime, Always),
    Call(SYS_timer_getoverrun, Always),
    Call(SYS_timer_delete, Always),
];

/// A vCPU of engine `kvm`: every request to /dev/kvm's descriptors.
pub(crate) const VCPU_KVM: &[Call] = &[Call(SYS_ioctl, Family(1, KVM_FAMILY))];

/// The I/O thread: connections that come in.
pub(crate) const IO: &[Call] = &[
    Call(SYS_accept4, Always),
    Call(SYS_setsockopt, Always),
    Call(SYS_ioctl, Family(1, KVM_FAMILY)),
];

/// Threads of disks and networks, and those that wait for events.
pub(crate) const WORKER: &[Call] = &[
    Call(SYS_accept4, Always),
    Call(SYS_setsockopt, Always),
    Call(SYS_flock, Always),
    Call(SYS_ioctl, Family(1, KVM_FAMILY)),
];

/// Where Python steers the machine.
pub(crate) const CONTROL: &[Call] = &[
    // Files, by name: those that Landlock grants.
    Call(SYS_open, Always),
    Call(SYS_openat, Always),
    Call(SYS_stat, Always),
    Call(SYS_lstat, Always),
    Call(SYS_newfstatat, Always),
    Call(SYS_statx, Always),
    Call(SYS_statfs, Always),
    Call(SYS_fstatfs, Always),
    Call(SYS_access, Always),
    Call(SYS_faccessat, Always),
    Call(SYS_faccessat2, Always),
    Call(SYS_readlink, Always),
    Call(SYS_readlinkat, Always),
    Call(SYS_getdents64, Always),
    Call(SYS_getcwd, Always),
    Call(SYS_unlink, Always),
    Call(SYS_unlinkat, Always),
    Call(SYS_rmdir, Always),
    Call(SYS_rename, Always),
    Call(SYS_renameat, Always),
    Call(SYS_renameat2, Always),
    Call(SYS_mkdir, Always),
    Call(SYS_mkdirat, Always),
    Call(SYS_umask, Always),
    Call(SYS_fchmod, Always),
    Call(SYS_flock, Always),
    Call(SYS_memfd_create, Always),
    Call(SYS_copy_file_range, Always),
    Call(SYS_getxattr, Always),
    // Modules of Python's that are loaded late have code: files that Landlock grants.
    Call(SYS_mmap, Always),
    Call(SYS_mprotect, Always),
    // Descriptors.
    Call(SYS_dup, Always),
    Call(SYS_dup2, Always),
    Call(SYS_dup3, Always),
    Call(SYS_pipe2, Always),
    Call(SYS_select, Always),
    Call(SYS_pselect6, Always),
    Call(SYS_accept4, Always),
    Call(SYS_accept, Always),
    Call(SYS_getsockname, Always),
    Call(SYS_getpeername, Always),
    Call(SYS_setsockopt, Always),
    // A terminal, but nothing that types into one (TIOCSTI).
    Call(SYS_ioctl, OneOf(1, TERMINAL_IOCTLS)),
    Call(SYS_ioctl, Family(1, KVM_FAMILY)),
    // Timers, limits and names, to look at.
    Call(SYS_timer_create, Always),
    Call(SYS_timer_settime, Always),
    Call(SYS_timer_delete, Always),
    Call(SYS_setitimer, Always),
    Call(SYS_getrusage, Always),
    Call(SYS_times, Always),
    Call(SYS_sysinfo, Always),
    Call(SYS_uname, Always),
    Call(SYS_getuid, Always),
    Call(SYS_geteuid, Always),
    Call(SYS_getgid, Always),
    Call(SYS_getegid, Always),
    Call(SYS_getppid, Always),
    Call(SYS_getpgrp, Always),
    Call(SYS_getpgid, Always),
    Call(SYS_prlimit64, Eq(2, 0)),
    // Children that were started before: waited for, and signalled where `filter.rs` names them.
    Call(SYS_wait4, Always),
    Call(SYS_waitid, Always),
    Call(SYS_kill, OwnProcess(0)),
    Call(SYS_rt_sigtimedwait, Always),
];

/// Where a machine has a vsock or a switch: whoever listens at a Unix socket is connected to.
/// No rule of Linux before 7.0 says at which.
pub(crate) const UNIX_SOCKETS: &[Call] = &[
    Call(SYS_socket, SmallFamily(AF_UNIX as u64)),
    Call(SYS_connect, Always),
    Call(SYS_bind, Always),
    Call(SYS_listen, Always),
    Call(SYS_unlink, Always),
    Call(SYS_unlinkat, Always),
];

/// Of /dev/kvm and its descriptors: requests of type 0xAE (linux/kvm.h).
const KVM_FAMILY: u64 = 0xAE;

/// What a thread of pthreads has in common with its process, and no process has.
const THREAD_FLAGS: u64 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as u64;

/// Flags of descriptors; what a tap device offloads; blocks of a device that are given up.
const DESCRIPTOR_IOCTLS: &[u64] = &[
    FIONBIO,
    FIOCLEX,
    FIONREAD,
    // linux/if_tun.h
    0x4004_54D0, // TUNSETOFFLOAD
    0x4004_54D8, // TUNSETVNETHDRSZ
    0x8004_54D2, // TUNGETIFF
    // linux/fs.h
    0x1277,      // BLKDISCARD
    0x127F,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
];

const TERMINAL_IOCTLS: &[u64] = &[TCGETS, TCSETS, TCSETSW, TCSETSF, TIOCGWINSZ, TIOCGPGRP];
