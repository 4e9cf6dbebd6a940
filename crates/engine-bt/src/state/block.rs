//! The memory block that GS points to: vCPU state and the tables beside it.
//!
//! Everything that translated code looks up without a call lies at a constant
//! distance from GS: the TLBs, the table of indirect branch targets and the
//! table of executable pages. While that code runs, RSP holds the same address, and
//! it finds all of them by RSP: a CPU that renames memory keeps what was stored at a
//! displacement from RSP in a register for the load that follows, so that a guest
//! register that lives here, or flags put aside, cost no trip through the cache (seen
//! on a Zen 5: no latency, where it was five cycles by GS). Below the block is room for what is pushed
//! then: the way back from a stub, and a signal's frame where a handler has no stack
//! of its own. The block is one sparse mapping; tables of 65,536
//! entries cost only the pages that are touched, and make index computation one
//! rotate and one mask, with no conflicts within 256 MiB.

use std::mem::size_of;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::state::{CpuState, Shared, StackPage};

/// Index bits of the TLBs: pages of 256 MiB map to different entries.
pub const TLB_BITS: u32 = 16;
pub const TLB_ENTRIES: usize = 1 << TLB_BITS;
const TLB_BYTES: usize = TLB_ENTRIES * size_of::<TlbEntry>();

/// Index bits of the indirect branch table: the low bits of the target.
pub const BRANCH_BITS: u32 = 16;
pub const BRANCH_ENTRIES: usize = 1 << BRANCH_BITS;
const BRANCH_BYTES: usize = BRANCH_ENTRIES * size_of::<BranchEntry>();

/// Index bits of the table of executable pages.
pub const EXEC_BITS: u32 = 16;
pub const EXEC_ENTRIES: usize = 1 << EXEC_BITS;
const EXEC_BYTES: usize = EXEC_ENTRIES * size_of::<u32>();
const EXEC_PAGE_BYTES: usize = EXEC_ENTRIES * size_of::<u64>();

/// Offsets from GS. Tables come in pairs: for kernel mode, then for user mode.
pub const STATE_BYTES: usize = 16 * 1024;
pub const BRANCH_OFFSET: usize = STATE_BYTES;
pub const EXEC_OFFSET: usize = BRANCH_OFFSET + 2 * BRANCH_BYTES;
/// For user mode alone: the linear page of an entry whose exec id does not tell it.
pub const EXEC_PAGE_OFFSET: usize = EXEC_OFFSET + 2 * EXEC_BYTES;
pub const TLB_OFFSET: usize = EXEC_PAGE_OFFSET + EXEC_PAGE_BYTES;
pub const BLOCK_BYTES: usize = TLB_OFFSET + 4 * TLB_BYTES;

/// Below the block: the stack of translated code.
const CODE_STACK_BYTES: usize = 64 * 1024;
const MAPPED_BYTES: usize = CODE_STACK_BYTES + BLOCK_BYTES;

/// The part of the block that other threads write.
pub const SHARED_OFFSET: usize = STATE_BYTES / 2;

const _: () = assert!(size_of::<CpuState>() <= SHARED_OFFSET);

/// The page of the stack, for kernel and for user mode: a copy of the TLB's write
/// entry, found without an index.
pub const STACK_OFFSET: usize = SHARED_OFFSET + size_of::<Shared>();

const _: () = assert!(STACK_OFFSET + 2 * size_of::<StackPage>() <= STATE_BYTES);

pub const fn stack_offset(user: bool) -> usize {
    STACK_OFFSET + user as usize * size_of::<StackPage>()
}

pub const fn branch_offset(user: bool) -> usize {
    BRANCH_OFFSET + user as usize * BRANCH_BYTES
}

pub const fn exec_offset(user: bool) -> usize {
    EXEC_OFFSET + user as usize * EXEC_BYTES
}

pub const fn tlb_offset(user: bool, write: bool) -> usize {
    TLB_OFFSET + (user as usize * 2 + write as usize) * TLB_BYTES
}

/// A page as translated code finds it: the access hits if the linear address
/// lies in the page at `page`, and is then made at `host`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    pub page: u64,
    pub host: u64,
}

/// A guest branch target and its translation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BranchEntry {
    pub target: u64,
    pub host: u64,
}

/// The memory. It lives as long as anybody has a pointer into it: the vCPU, or a
/// bell or timer that sets its flags.
struct Mapping {
    /// Where the block begins, behind the stack.
    base: NonNull<u8>,
    /// What another process would map.
    _memfd: OwnedFd,
}

// SAFETY: plain memory. Nothing here hands out a reference to it but
// `SharedFlags`, to atomics, and `StateBlock`, to what it alone owns.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> std::io::Result<Self> {
        let memfd = memfd_create("tetrarch-vcpu", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, MAPPED_BYTES as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(null_mut(), MAPPED_BYTES, protection, flags, &memfd, 0)? };
        // Huge pages would turn the sparse tables into dense ones, and a child of
        // fork would share a running CPU.
        for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontFork] {
            // SAFETY: the range is the mapping just made. A kernel without huge
            // pages refuses the first.
            let _ = unsafe { madvise(start, MAPPED_BYTES, advice) };
        }
        // SAFETY: inside the mapping.
        let base = unsafe { start.cast::<u8>().add(CODE_STACK_BYTES) };
        let base = NonNull::new(base).ok_or(std::io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, _memfd: memfd })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping, of which `base` is so far from the start, is ours and nothing
        // borrows from it any more.
        let _ = unsafe { munmap(self.base.as_ptr().sub(CODE_STACK_BYTES).cast(), MAPPED_BYTES) };
    }
}

/// The flags that other threads set; they outlive the vCPU.
#[derive(Clone)]
pub struct SharedFlags(Arc<Mapping>);

impl Deref for SharedFlags {
    type Target = Shared;

    #[inline]
    fn deref(&self) -> &Shared {
        // SAFETY: it lies inside the mapping, holds only atomics, and zero is valid.
        unsafe { &*self.0.base.as_ptr().add(SHARED_OFFSET).cast() }
    }
}

/// A vCPU's own part of the memory: the tables beside its state. There is one for
/// each mapping.
pub struct StateBlock {
    flags: SharedFlags,
}

impl StateBlock {
    pub fn new() -> std::io::Result<Self> {
        let mut block = Self { flags: SharedFlags(Arc::new(Mapping::new()?)) };
        block.forget_stack();
        for user in [false, true] {
            block.branches_mut(user)[0].target = INVALID_BRANCH_0;
            for write in [false, true] {
                block.tlb_mut(user, write)[0].page = INVALID_PAGE_0;
            }
        }
        Ok(block)
    }

    /// The address that GS holds.
    pub fn base(&self) -> *mut u8 {
        self.flags.0.base.as_ptr()
    }

    pub fn state_ptr(&self) -> *mut CpuState {
        self.base().cast()
    }

    /// The flags that other threads set.
    #[inline]
    pub fn shared(&self) -> &SharedFlags {
        &self.flags
    }

    /// Drops the stack pages: an entry of the TLB has gone that they may copy.
    pub fn forget_stack(&mut self) {
        self.table_mut(STACK_OFFSET, 2).fill(StackPage::NONE);
    }

    #[inline]
    fn table<T>(&self, offset: usize, len: usize) -> &[T] {
        // SAFETY: the tables lie inside the mapping (BLOCK_BYTES is their sum), apart
        // from each other and from state and flags, are aligned, and hold plain
        // integers. `self` is their one owner, and no translated code runs while
        // Rust code of its thread does.
        unsafe { std::slice::from_raw_parts(self.base().add(offset).cast(), len) }
    }

    #[inline]
    fn table_mut<T>(&mut self, offset: usize, len: usize) -> &mut [T] {
        // SAFETY: as above, and `&mut self` is the only way to them.
        unsafe { std::slice::from_raw_parts_mut(self.base().add(offset).cast(), len) }
    }

    #[inline]
    pub fn tlb(&self, user: bool, write: bool) -> &[TlbEntry] {
        self.table(tlb_offset(user, write), TLB_ENTRIES)
    }

    #[inline]
    pub fn tlb_mut(&mut self, user: bool, write: bool) -> &mut [TlbEntry] {
        self.table_mut(tlb_offset(user, write), TLB_ENTRIES)
    }

    #[inline]
    pub fn branches(&self, user: bool) -> &[BranchEntry] {
        self.table(branch_offset(user), BRANCH_ENTRIES)
    }

    #[inline]
    pub fn branches_mut(&mut self, user: bool) -> &mut [BranchEntry] {
        self.table_mut(branch_offset(user), BRANCH_ENTRIES)
    }

    #[inline]
    pub fn exec(&self, user: bool) -> &[u32] {
        self.table(exec_offset(user), EXEC_ENTRIES)
    }

    #[inline]
    pub fn exec_mut(&mut self, user: bool) -> &mut [u32] {
        self.table_mut(exec_offset(user), EXEC_ENTRIES)
    }

    #[inline]
    pub fn exec_pages(&self) -> &[u64] {
        self.table(EXEC_PAGE_OFFSET, EXEC_ENTRIES)
    }

    #[inline]
    pub fn exec_pages_mut(&mut self) -> &mut [u64] {
        self.table_mut(EXEC_PAGE_OFFSET, EXEC_ENTRIES)
    }
}

/// An entry is invalid while its tag belongs to another index. Zero does for
/// every index but 0, so fresh memory is an empty table.
pub const INVALID_PAGE_0: u64 = 0x1000;
pub const INVALID_BRANCH_0: u64 = 1;

#[inline]
pub fn tlb_index(linear: u64) -> usize {
    (linear >> 12) as usize & (TLB_ENTRIES - 1)
}

#[inline]
pub fn branch_index(linear: u64) -> usize {
    linear as usize & (BRANCH_ENTRIES - 1)
}

#[inline]
pub fn exec_index(linear: u64) -> usize {
    (linear >> 12) as usize & (EXEC_ENTRIES - 1)
}
