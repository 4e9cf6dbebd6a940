//! A list of system calls as a filter of the kernel's (seccomp(2)).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// A call that is allowed, and when.
pub(crate) struct Call(pub libc::c_long, pub When);

pub(crate) enum When {
    Always,
    /// Argument and value.
    Eq(u8, u64),
    /// Argument and bits, of which none may be there,
    NoBits(u8, u64),
    /// or all have to be.
    Bits(u8, u64),
    OneOf(u8, &'static [u64]),
    /// The request of an ioctl: its type, which is the second byte (asm-generic/ioctl.h).
    Family(u8, u64),
    /// A socket's family.
    SmallFamily(u64),
    /// The argument is this process, or a child that was named.
    OwnProcess(u8),
    /// newfstatat(2) of a descriptor: without a name.
    PathlessStat,
}

/// Installs nothing: a program for the lists together. `processes` are those that may be
/// signalled.
pub(crate) fn compile(
    lists: &[&[Call]],
    processes: &[u64],
) -> Result<BpfProgram, seccompiler::Error> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    let mut always = Vec::new();
    for Call(number, when) in lists.iter().copied().flatten() {
        let of_call = rules.entry(*number).or_default();
        match alternatives(when, processes)? {
            Some(more) => of_call.extend(more),
            None => always.push(*number),
        }
    }
    for number in always {
        rules.insert(number, Vec::new());
    }
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, denied, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// clone3(2) as on a kernel without it, so that threads are made by clone(2), whose flags a
/// filter sees.
pub(crate) fn without_clone3() -> Result<BpfProgram, seccompiler::Error> {
    let missing = SeccompAction::Errno(libc::ENOSYS as u32);
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64)?.try_into()?)
}

/// One of these has to hold; none where nothing has to.
fn alternatives(
    when: &When,
    processes: &[u64],
) -> Result<Option<Vec<SeccompRule>>, seccompiler::Error> {
    let one = |argument, op, value| {
        SeccompCondition::new(argument, Len::Qword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    // Numbers of ioctls, processes and families are 32 bits: the kernel ignores those above.
    let word = |argument, op, value| {
        SeccompCondition::new(argument, Len::Dword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    Ok(Some(match *when {
        When::Always => return Ok(None),
        When::Eq(argument, value) => vec![one(argument, Op::Eq, value)?],
        When::NoBits(argument, bits) => vec![one(argument, Op::MaskedEq(bits), 0)?],
        When::Bits(argument, bits) => vec![one(argument, Op::MaskedEq(bits), bits)?],
        When::OneOf(argument, values) => {
            values.iter().map(|value| word(argument, Op::Eq, *value)).collect::<Result<_, _>>()?
        }
        When::Family(argument, family) => vec![word(argument, Op::MaskedEq(0xFF00), family << 8)?],
        When::SmallFamily(family) => vec![word(0, Op::Eq, family)?],
        When::OwnProcess(argument) => {
            processes.iter().map(|pid| word(argument, Op::Eq, *pid)).collect::<Result<_, _>>()?
        }
        When::PathlessStat => {
            let flag = libc::AT_EMPTY_PATH as u64;
            vec![word(3, Op::MaskedEq(flag), flag)?]
        }
    }))
}

/// Whether the kernel has filters: before a thread is there that cannot do without.
pub(crate) fn available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads 32 bits at the address.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts a filter on the calling thread, and on those that it will make.
pub(crate) fn install(program: &BpfProgram) -> io::Result<()> {
    let filter = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // No mitigation of speculation comes with it, which Linux before 5.16 would switch on and
    // which translated code would pay for: a thread has it with and without a filter alike.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `filter` has the address and the length of `program`, of sock_filters, which the
    // kernel copies before it returns.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &filter) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
