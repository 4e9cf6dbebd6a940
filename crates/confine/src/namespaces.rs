//! A network with nothing in it, and no capabilities (user_namespaces(7), network_namespaces(7)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, capabilities, set_capabilities,
    unshare_unsafe,
};

/// Makes a user namespace, in which this process may make others, and keeps its user and group.
/// To be called while the process has one thread; with rights over the host's namespaces it is
/// not needed and does nothing. Fails where the host forbids it.
pub fn own_user_namespace() -> io::Result<()> {
    if capabilities(None)?.effective.contains(CapabilitySet::SYS_ADMIN) {
        return Ok(());
    }
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: of what threads share only the namespace and the capabilities change.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    // A group may be mapped by who cannot leave groups that forbid something.
    std::fs::write("/proc/self/setgroups", "deny")?;
    let same = |id: u32| format!("{id} {id} 1");
    std::fs::write("/proc/self/uid_map", same(user.as_raw()))?;
    std::fs::write("/proc/self/gid_map", same(group.as_raw()))
}

/// A namespace for all threads to enter; none where the host does not let us.
pub(crate) fn empty_network() -> Option<OwnedFd> {
    // By a thread of its own: only with rights over the host's could one go back, and the machine
    // is yet to be made, maybe with networks.
    let maker = || {
        // SAFETY: this thread goes to another network namespace; descriptors stay as they are.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.ok()?;
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from).ok()
    };
    std::thread::Builder::new().spawn(maker).ok()?.join().ok()?
}

/// One that a confined thread has made is there already, and has no right to enter anything.
pub(crate) fn may_enter_network() -> io::Result<bool> {
    Ok(capabilities(None)?.effective.contains(CapabilitySet::SYS_ADMIN))
}

pub(crate) fn enter_network(namespace: &OwnedFd) -> io::Result<()> {
    let kind = Some(LinkNameSpaceType::Network);
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?)
}

/// Of the calling thread. `children`: it may signal those that have become another user, as
/// passt does when root starts it; which these are is the filter's business.
pub(crate) fn drop_capabilities(children: bool) -> io::Result<()> {
    let mut left = capabilities(None)?.permitted;
    left &= if children { CapabilitySet::KILL } else { CapabilitySet::empty() };
    let inheritable = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: left, permitted: left, inheritable })?)
}
