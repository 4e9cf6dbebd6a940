//! The escape drill: what hostile code in a thread might try, from each kind of thread. The
//! process is confined once, so all of it is one test.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use tetrarch_confine::{Confinement, FileAccess, Needs, ThreadKind, enter, spawn_worker};

type Attempt = (&'static str, Box<dyn Fn() -> libc::c_long>);

/// Each gives what the call gave: a number below 0 with errno, or something that was got.
fn attempts(outside: &CString, inside: &CString) -> Vec<Attempt> {
    use libc::*;
    let (outside, inside) = (outside.as_ptr() as usize, inside.as_ptr() as usize);
    macro_rules! tries {
        ($($name:ident($($argument:expr),*)),* $(,)?) => {
            vec![$((stringify!($name), Box::new(move || {
                // SAFETY: each call is one that the kernel refuses before it does anything, and
                // what it would read are strings and zeroes of this test.
                unsafe { libc::syscall(libc::$name, $($argument),*) }
            }) as Box<dyn Fn() -> libc::c_long>)),*]
        };
    }
    const HERE: usize = AT_FDCWD as usize;
    static ZEROES: [u8; 4096] = [0; 4096];
    let zeroes = ZEROES.as_ptr() as usize;
    tries![
        // Files of others.
        SYS_open(outside, O_RDONLY),
        SYS_openat(HERE, outside, O_RDONLY),
        SYS_openat2(HERE, outside, zeroes, 24),
        SYS_creat(inside, 0o600),
        SYS_truncate(outside, 0),
        SYS_unlink(outside),
        SYS_unlinkat(HERE, outside, 0),
        SYS_rename(outside, inside),
        SYS_link(outside, inside),
        SYS_symlink(outside, inside),
        SYS_mkdir(inside, 0o700),
        SYS_mknod(inside, S_IFREG | 0o600, 0),
        SYS_chmod(outside, 0o777),
        SYS_chown(outside, 0, 0),
        SYS_setxattr(outside, zeroes, zeroes, 1, 0),
        SYS_name_to_handle_at(HERE, outside, zeroes, zeroes, 0),
        SYS_open_by_handle_at(HERE, zeroes, 0),
        SYS_inotify_init1(0),
        SYS_fanotify_init(0, 0),
        SYS_chdir(outside),
        SYS_chroot(outside),
        SYS_mount(zeroes, outside, zeroes, 0, zeroes),
        SYS_umount2(outside, 0),
        SYS_pivot_root(outside, outside),
        SYS_fsopen(zeroes, 0),
        SYS_open_tree(HERE, outside, 1),
        // Networks.
        SYS_socket(AF_INET, SOCK_STREAM, 0),
        SYS_socket(AF_INET6, SOCK_DGRAM, 0),
        SYS_socket(AF_NETLINK, SOCK_RAW, 0),
        SYS_socket(AF_PACKET, SOCK_RAW, 0),
        SYS_socket(AF_ALG, SOCK_SEQPACKET, 0),
        SYS_sendto(0, zeroes, 1, 0, zeroes, 16),
        // Programs and processes.
        SYS_execve(outside, zeroes, zeroes),
        SYS_execveat(HERE, outside, zeroes, zeroes, 0),
        SYS_fork(),
        SYS_vfork(),
        SYS_clone(SIGCHLD, 0, 0, 0, 0),
        SYS_clone3(zeroes, 88),
        SYS_ptrace(PTRACE_TRACEME, 0, 0, 0),
        SYS_process_vm_readv(1, zeroes, 1, zeroes, 1, 0),
        SYS_process_vm_writev(1, zeroes, 1, zeroes, 1, 0),
        SYS_kill(1, 0),
        SYS_tgkill(1, 1, 0),
        SYS_tkill(1, 0),
        SYS_rt_sigqueueinfo(1, 0, zeroes),
        SYS_pidfd_open(1, 0),
        SYS_pidfd_getfd(0, 0, 0),
        SYS_fcntl(0, F_SETOWN, 1),
        SYS_setpriority(PRIO_PROCESS, 1, -20),
        SYS_sched_setscheduler(1, 1, zeroes),
        SYS_prlimit64(1, RLIMIT_NOFILE, zeroes, 0),
        SYS_setrlimit(RLIMIT_NOFILE, zeroes),
        // Other rights.
        SYS_setuid(0),
        SYS_setgid(0),
        SYS_unshare(CLONE_NEWUSER),
        SYS_setns(0, CLONE_NEWNET),
        SYS_prctl(PR_SET_DUMPABLE, 1, 0, 0, 0),
        SYS_personality(0x0040_0000),
        SYS_keyctl(0, -3, 0, 0, 0),
        SYS_add_key(zeroes, zeroes, zeroes, 1, -3),
        SYS_request_key(zeroes, zeroes, zeroes, 0),
        // The kernel's further machinery.
        SYS_io_uring_setup(8, zeroes),
        SYS_io_uring_register(0, 0, 0, 0),
        SYS_io_setup(1, zeroes),
        SYS_userfaultfd(0),
        SYS_bpf(0, zeroes, 0),
        SYS_perf_event_open(zeroes, 0, -1, -1, 0),
        SYS_memfd_secret(0),
        SYS_shmget(0, 4096, 0o600),
        SYS_msgget(0, 0o600),
        SYS_semget(0, 1, 0o600),
        SYS_mq_open(zeroes, O_CREAT, 0o600, 0),
        SYS_init_module(zeroes, 0, zeroes),
        SYS_kexec_load(0, 0, zeroes, 0),
        SYS_reboot(0, 0, 0, 0),
        SYS_swapon(zeroes, 0),
        SYS_syslog(3, zeroes, 0),
        SYS_acct(0),
        SYS_clock_settime(0, zeroes),
        SYS_iopl(3),
        SYS_ioperm(0x3f8, 1, 1),
        SYS_modify_ldt(1, zeroes, 16),
        SYS_quotactl(0, zeroes, 0, zeroes),
        SYS_lookup_dcookie(0, zeroes, 0),
        SYS_ioctl(0, TIOCSTI, zeroes),
        SYS_ioctl(0, 0x8933, zeroes),
    ]
}

/// What a vCPU has no business to do with a file that is open for both.
fn file_attempts(file: i32) -> Vec<Attempt> {
    macro_rules! tries {
        ($($name:ident($($argument:expr),*)),* $(,)?) => {
            vec![$((stringify!($name), Box::new(move || {
                // SAFETY: what is written are zeroes of this test, to its own file.
                unsafe { libc::syscall(libc::$name, $($argument),*) }
            }) as Box<dyn Fn() -> libc::c_long>)),*]
        };
    }
    static ZEROES: [u8; 64] = [0; 64];
    let zeroes = ZEROES.as_ptr() as usize;
    tries![
        SYS_pwrite64(file, zeroes, 1, 0),
        SYS_pwritev(file, zeroes, 0, 0, 0),
        SYS_pwritev2(file, zeroes, 0, 0, 0, 0),
        SYS_preadv(file, zeroes, 0, 0, 0),
        SYS_lseek(file, 0, 0),
        SYS_ftruncate(file, 0),
        SYS_fallocate(file, 0, 0, 1),
        SYS_fsync(file),
        SYS_fdatasync(file),
    ]
}

/// Those that worked, of all.
fn worked(attempts: &[Attempt]) -> Vec<String> {
    let mut found = Vec::new();
    for (name, attempt) in attempts {
        let result = attempt();
        let error = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let refused = [libc::EPERM, libc::EACCES, libc::ENOSYS].contains(&error);
        if result >= 0 || !refused {
            found.push(format!("{name} gave {result}, errno {error}"));
        }
    }
    found
}

#[test]
fn no_kind_of_thread_can_do_what_hostile_code_may_try() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("drill");
    std::fs::create_dir_all(&folder).unwrap();
    let granted = folder.join("granted");
    std::fs::write(&granted, "x").unwrap();
    // Somebody's; one of our own, so that an escape does no harm.
    std::fs::write(folder.join("outside"), "x").unwrap();
    let path = folder.join("outside");
    let outside = CString::new(path.to_str().unwrap()).unwrap();
    let inside = CString::new(folder.join("new").to_str().unwrap()).unwrap();
    // The control thread's, which may open what Landlock grants; its own file is no escape.
    let attempts = || attempts(&outside, &inside);
    assert!(attempts().len() >= 60);

    let confinement = Confinement::prepare(Needs::default()).unwrap();
    for kind in ThreadKind::ALL {
        let found = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Without it the same calls work: the drill sees a confinement, and not a host.
                let before = std::fs::File::open(&path).is_ok();
                enter(kind);
                (before, worked(&attempts()))
            });
            thread.join().unwrap()
        });
        assert_eq!(found, (true, Vec::new()), "a thread of kind {kind:?}");
    }
    let open = std::fs::File::options().read(true).write(true).open(&granted).unwrap();
    let file = open.as_raw_fd();
    for kind in ThreadKind::ALL {
        let vcpu = matches!(kind, ThreadKind::VcpuBt | ThreadKind::VcpuKvm);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                enter(kind);
                let found = worked(&file_attempts(file));
                // A vCPU that sets a disk's queues up has threads made for it, which can.
                let ask = move || assert_eq!(worked(&file_attempts(file)).len(), 9);
                (found, spawn_worker("worker", ask).unwrap().join().is_ok())
            });
            let (found, workers_can) = thread.join().unwrap();
            assert_eq!(found.len(), if vcpu { 0 } else { 9 }, "{kind:?}: {found:?}");
            assert!(workers_can, "{kind:?}");
        });
    }
    std::fs::write(&granted, "x").unwrap();

    // One that was there before, which only a signal reaches; and what may still be done.
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let (attempts, asked) = (&attempts, asked);
        let other = scope.spawn(move || {
            asked.recv().unwrap();
            worked(&attempts())
        });
        confinement.enter_control(&[(granted.clone(), FileAccess::Read)], &[]).unwrap();
        ask.send(()).unwrap();
        assert_eq!(other.join().unwrap(), Vec::<String>::new(), "a thread that was there");
    });
    assert_eq!(worked(&attempts()), Vec::<String>::new(), "the thread that confines the process");
    assert_eq!(std::fs::read_to_string(&granted).unwrap(), "x");
    assert!(std::fs::write(&granted, "y").is_err(), "it was granted for reading alone");
    assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err());
    let child: std::io::Result<_> = std::process::Command::new("/bin/true").status();
    assert!(child.is_err(), "a program was started");
    std::thread::spawn(|| ()).join().unwrap();
}
