//! What the threads of a machine's process give up before its guest runs.
//!
//! Confinement belongs to threads in Linux: a filter of system calls, Landlock's rules, the
//! network namespace, capabilities. New threads have those of the one that makes them. So a
//! thread takes its own upon itself when it starts ([`enter`]), with the lists of its kind
//! (`lists.rs`), and all others do when everything is opened ([`Confinement::enter_control`]).
//!
//! Nothing of it happens in a process that has not called [`Confinement::prepare`]: a library
//! has no business to confine its user's process.

mod files;
mod filter;
mod limits;
mod lists;
mod namespaces;
mod others;
mod spawn;

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use seccompiler::BpfProgram;

pub use files::{FileAccess, landlock_version};
pub use namespaces::own_user_namespace;
pub use spawn::spawn_worker;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// A vCPU of engine `bt`,
    VcpuBt,
    /// or of engine `kvm`.
    VcpuKvm,
    /// Devices' data paths.
    Io,
    /// Disks that are no io_uring's, networks, and whoever waits for events.
    Worker,
}

impl ThreadKind {
    pub const ALL: [Self; 4] = [Self::VcpuBt, Self::VcpuKvm, Self::Io, Self::Worker];

    fn lists(self, unix_sockets: bool) -> Vec<&'static [filter::Call]> {
        let own = match self {
            Self::VcpuBt => lists::VCPU_BT,
            Self::VcpuKvm => lists::VCPU_KVM,
            Self::Io => lists::IO,
            Self::Worker => lists::WORKER,
        };
        let mut all = vec![lists::EVERY, own];
        if matches!(self, Self::Io | Self::Worker) {
            all.push(lists::FILES);
        }
        if unix_sockets && matches!(self, Self::Io | Self::Worker) {
            all.push(lists::UNIX_SOCKETS);
        }
        all
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("a filter of system calls cannot be made: {0}")]
    Filter(#[from] seccompiler::Error),
    #[error("{0}: {1}")]
    Refused(&'static str, #[source] io::Error),
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("this process is confined already")]
    Twice,
}

/// What a machine needs of its host while it runs.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Whether somebody's Unix socket is connected to, or one is made, while the guest runs.
    pub unix_sockets: bool,
    /// Where threads other than Python's may make sockets: directories.
    pub socket_directories: Vec<std::path::PathBuf>,
}

/// The process's: made once, before its threads are.
pub struct Confinement {
    needs: Needs,
    programs: Vec<(ThreadKind, BpfProgram)>,
    clone3: BpfProgram,
    /// Of threads that are none of Python's.
    files: Option<OwnedFd>,
    /// A network namespace that has nothing in it.
    network: Option<OwnedFd>,
}

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();
/// What threads with no kind of their own take: files, and calls.
static CONTROL: OnceLock<(Option<OwnedFd>, BpfProgram)> = OnceLock::new();

/// Also in a signal's handler: nothing is allocated, and no lock is taken.
fn take_control() -> Result<(), ConfineError> {
    let (Some(confinement), Some((files, program))) = (CONFINEMENT.get(), CONTROL.get()) else {
        return Ok(());
    };
    confinement.give_up(files.as_ref(), true)?;
    confinement.install(program)
}

impl Confinement {
    /// From here on threads are confined as they start.
    pub fn prepare(needs: Needs) -> Result<&'static Self, ConfineError> {
        filter::available().map_err(|error| ConfineError::Refused("seccomp", error))?;
        let own = u64::from(std::process::id());
        let programs = ThreadKind::ALL
            .into_iter()
            .map(|kind| Ok((kind, filter::compile(&kind.lists(needs.unix_sockets), &[own])?)))
            .collect::<Result<_, seccompiler::Error>>()?;
        let grants: Vec<_> = needs
            .socket_directories
            .iter()
            .map(|path| (path.clone(), FileAccess::Sockets))
            .collect();
        let made = Self {
            files: files::ruleset(&grants)?,
            network: namespaces::empty_network(),
            clone3: filter::without_clone3()?,
            programs,
            needs,
        };
        CONFINEMENT.set(made).map_err(|_| ConfineError::Twice)?;
        spawn::prepare().map_err(|error| ConfineError::Refused("a thread", error))?;
        Ok(CONFINEMENT.get().expect("it was set"))
    }

    /// That of this process, where it has one.
    pub fn get() -> Option<&'static Self> {
        CONFINEMENT.get()
    }

    /// Whether threads go into a network with nothing in it.
    pub fn has_network(&self) -> bool {
        self.network.is_some()
    }

    /// The calling thread, all others that have no lists of their own, and those that they make
    /// from now on. `children` may be signalled, `grants` be opened.
    pub fn enter_control(
        &self,
        grants: &[(std::path::PathBuf, FileAccess)],
        children: &[u32],
    ) -> Result<(), ConfineError> {
        limits::lower().map_err(|error| ConfineError::Refused("limits", error))?;
        let files = files::ruleset(grants)?;
        let mut processes = vec![u64::from(std::process::id())];
        processes.extend(children.iter().map(|pid| u64::from(*pid)));
        let mut all = vec![lists::EVERY, lists::FILES, lists::CONTROL];
        if self.needs.unix_sockets {
            all.push(lists::UNIX_SOCKETS);
        }
        let program = filter::compile(&all, &processes)?;
        CONTROL.set((files, program)).map_err(|_| ConfineError::Twice)?;
        others::all(|| take_control().is_ok())
            .map_err(|error| ConfineError::Refused("threads", error))?;
        take_control()
    }

    /// What is not by the kind of a thread.
    fn give_up(&self, files: Option<&OwnedFd>, children: bool) -> Result<(), ConfineError> {
        rustix::thread::set_no_new_privs(true)
            .map_err(|error| ConfineError::Refused("no new privileges", error.into()))?;
        let refused = |error| ConfineError::Refused("network namespace", error);
        if let Some(network) = &self.network
            && namespaces::may_enter_network().map_err(refused)?
        {
            namespaces::enter_network(network).map_err(refused)?;
        }
        if let Some(files) = files {
            files::restrict(files).map_err(|error| ConfineError::Refused("Landlock", error))?;
        }
        namespaces::drop_capabilities(children)
            .map_err(|error| ConfineError::Refused("capabilities", error))
    }

    fn install(&self, program: &BpfProgram) -> Result<(), ConfineError> {
        [&self.clone3, program]
            .into_iter()
            .try_for_each(filter::install)
            .map_err(|error| ConfineError::Refused("seccomp", error))
    }

    fn enter(&self, kind: ThreadKind) -> Result<(), ConfineError> {
        others::entered();
        self.give_up(self.files.as_ref(), false)?;
        let (_, program) =
            self.programs.iter().find(|(of, _)| *of == kind).expect("each kind has one");
        self.install(program)
    }
}

/// Whether threads of this process are confined as they start.
pub fn prepared() -> bool {
    CONFINEMENT.get().is_some()
}

/// [`enter`], once a thread: for one that comes by again and again.
pub fn enter_once(kind: ThreadKind) {
    thread_local!(static ENTERED: Cell<bool> = const { Cell::new(false) });
    if !ENTERED.replace(true) {
        enter(kind);
    }
}

/// The calling thread takes upon itself what its kind has, where this process is confined. A
/// thread that cannot would be one that a guest waits for: it ends the process.
pub fn enter(kind: ThreadKind) {
    let Some(confinement) = CONFINEMENT.get() else { return };
    if let Err(error) = confinement.enter(kind) {
        // What cannot be kept is not pretended: the user asked for a jail.
        log::error!("a thread cannot be confined: {error}");
        std::process::abort();
    }
}
