//! The memory block that GS points to: vCPU state and the tables beside it.
//!
//! Everything that translated code looks up without a call lies at a constant
//! distance from GS: the TLBs, the table of indirect branch targets and the
//! table of executable pages. The block is one sparse mapping; tables of 65,536
//! entries cost only the pages that are touched, and make index computation one
//! rotate and one mask, with no conflicts within 256 MiB.

use std::mem::size_of;
use std::ptr::NonNull;

use crate::cpu::state::{CpuState, Shared, StackPage};

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

/// Offsets from GS. Tables come in pairs: for kernel mode, then for user mode.
pub const STATE_BYTES: usize = 16 * 1024;
pub const BRANCH_OFFSET: usize = STATE_BYTES;
pub const EXEC_OFFSET: usize = BRANCH_OFFSET + 2 * BRANCH_BYTES;
pub const TLB_OFFSET: usize = EXEC_OFFSET + 2 * EXEC_BYTES;
pub const BLOCK_BYTES: usize = TLB_OFFSET + 4 * TLB_BYTES;

/// The part of the block that other threads write.
pub const SHARED_OFFSET: usize = STATE_BYTES / 2;

const _: () = assert!(size_of::<CpuState>() <= SHARED_OFFSET);

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

/// Owns the mapping.
pub struct StateBlock {
    base: NonNull<u8>,
}

// SAFETY: the block is plain memory owned by one vCPU; other threads touch only
// its atomics, through pointers made for that (`crate::exec::Kicker`).
unsafe impl Send for StateBlock {}
// SAFETY: as above; `shared` gives out atomics only.
unsafe impl Sync for StateBlock {}

impl StateBlock {
    pub fn new() -> std::io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BLOCK_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(std::io::Error::last_os_error)?;
        // Huge pages would turn the sparse tables into dense ones.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(base.as_ptr().cast(), BLOCK_BYTES, libc::MADV_NOHUGEPAGE) };
        let block = Self { base };
        block.forget_stack();
        for user in [false, true] {
            block.branches(user)[0].target = INVALID_BRANCH_0;
            for write in [false, true] {
                block.tlb(user, write)[0].page = INVALID_PAGE_0;
            }
        }
        Ok(block)
    }

    /// The address that GS holds.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub fn state_ptr(&self) -> *mut CpuState {
        self.base.as_ptr().cast()
    }

    /// Drops the stack pages: an entry of the TLB has gone that they may copy.
    pub fn forget_stack(&self) {
        // SAFETY: in the mapping; only the thread that owns the vCPU comes here.
        unsafe { (*self.state_ptr()).stack = [StackPage::NONE; 2] };
    }

    /// The flags that other threads set.
    pub fn shared(&self) -> &Shared {
        // SAFETY: it lies inside the mapping, holds only atomics, and zero is valid.
        unsafe { &*self.base.as_ptr().add(SHARED_OFFSET).cast() }
    }

    #[allow(clippy::mut_from_ref)]
    fn table<T>(&self, offset: usize, len: usize) -> &mut [T] {
        // SAFETY: the tables lie inside the mapping (BLOCK_BYTES is their sum),
        // are aligned to pages, hold plain integers, and only the thread that
        // owns the vCPU comes here or runs translated code.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(offset).cast(), len) }
    }

    #[allow(clippy::mut_from_ref)]
    pub fn tlb(&self, user: bool, write: bool) -> &mut [TlbEntry] {
        self.table(tlb_offset(user, write), TLB_ENTRIES)
    }

    #[allow(clippy::mut_from_ref)]
    pub fn branches(&self, user: bool) -> &mut [BranchEntry] {
        self.table(branch_offset(user), BRANCH_ENTRIES)
    }

    #[allow(clippy::mut_from_ref)]
    pub fn exec(&self, user: bool) -> &mut [u32] {
        self.table(exec_offset(user), EXEC_ENTRIES)
    }
}

impl Drop for StateBlock {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), BLOCK_BYTES) };
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
