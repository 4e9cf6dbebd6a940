//! Which files a thread may open by name: Landlock (Linux's Documentation/userspace-api/landlock.rst).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest version whose rights this code has looked at. What an older kernel lacks of them
/// it does not refuse.
const VERSION: ABI = ABI::V6;

/// What is granted of a path, and of what is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileAccess {
    Read,
    Write,
    /// Names of a directory may be listed and removed: sockets that are given up.
    Remove,
    /// Empty directories may be.
    RemoveDirectories,
    /// Sockets may be made, and removed.
    Sockets,
}

impl FileAccess {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Write => AccessFs::from_all(VERSION) & !BitFlags::from(AccessFs::Execute),
            Self::Remove => AccessFs::RemoveFile | AccessFs::ReadDir,
            Self::RemoveDirectories => AccessFs::RemoveDir.into(),
            Self::Sockets => AccessFs::MakeSock | AccessFs::RemoveFile,
        }
    }
}

/// What the kernel has, 0 where it has none.
pub fn landlock_version() -> i32 {
    // SAFETY: with this flag the call takes no memory and gives a number.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, 1u32)
    };
    version.try_into().unwrap_or(0).max(0)
}

/// A ruleset that grants this and nothing else; none where the kernel has no Landlock. A path that
/// is not there grants nothing.
pub(crate) fn ruleset(grants: &[(PathBuf, FileAccess)]) -> Result<Option<OwnedFd>, RulesetError> {
    if landlock_version() == 0 {
        return Ok(None);
    }
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VERSION))?
        .handle_access(AccessNet::from_all(VERSION))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    for (path, access) in grants {
        let Ok(place) = PathFd::new(path) else { continue };
        let mut rights = access.rights();
        if !path.is_dir() {
            rights &= AccessFs::from_file(VERSION);
        }
        if !rights.is_empty() {
            rules = rules.add_rule(PathBeneath::new(place, rights))?;
        }
    }
    Ok(Option::<OwnedFd>::from(rules))
}

/// The calling thread, and those that it makes. It has given up new privileges.
pub(crate) fn restrict(rules: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes a descriptor and flags, and no memory.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
