//! Paging (Intel SDM 3A, chapter 4) and the slow path of memory access.
//!
//! Translated code finds pages in the TLB; everything that misses comes here:
//! page walks, device memory, pages with translated code, page crossings.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use tetrarch_engine::GuestFault;
use tetrarch_memory::{GuestPhys, PAGE_SIZE};

use crate::cpu::Cpu;
use crate::memory::rendezvous::Orders;
use crate::memory::tlb::FetchedPage;
use crate::state::address::{PHYS_BITS, PHYS_MASK, canonical};
use crate::state::fault::{Fault, R, Stop, gp, pf, vector};
use crate::state::{cr, mask};

const PTE_P: u64 = 1 << 0;
const PTE_W: u64 = 1 << 1;
const PTE_U: u64 = 1 << 2;
const PTE_A: u64 = 1 << 5;
const PTE_D: u64 = 1 << 6;
const PTE_PS: u64 = 1 << 7;
const PTE_G: u64 = 1 << 8;
const PTE_NX: u64 = 1 << 63;
/// Of a page-directory pointer of PAE paging (SDM 3A, table 4-8).
const PDPTE_RESERVED: u64 = !PHYS_MASK | 0x1E6;
/// Of a 4 MiB page's entry: what PSE-36 leaves of bits 21:13 (SDM 3A, table 4-4).
const PDE_4M_RESERVED: u64 = ((1 << 22) - 1) & !((1 << (PHYS_BITS - 19)) - 1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// The result of a page walk.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// The guest physical address of the byte that was asked for.
    pub address: GuestPhys,
    /// Writing is allowed at the privilege of the walk and the page is dirty:
    /// the TLB may take a write entry.
    pub writable: bool,
    pub global: bool,
    /// Bytes of the page: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    pub size: u64,
}

impl Cpu {
    /// Translates a linear address, checks rights and sets A and D bits.
    pub fn walk(&mut self, linear: u64, access: Access, user: bool) -> Result<Walk, Fault> {
        if self.st.cr0 & cr::CR0_PG == 0 {
            let address = GuestPhys(linear & 0xFFFF_FFFF);
            return Ok(Walk { address, writable: true, global: false, size: PAGE_SIZE });
        }
        let result = if self.st.long_mode() {
            self.walk_levels(linear, access, user, self.st.cr3 & PHYS_MASK & !0xFFF, 4)
        } else if self.st.cr4 & cr::CR4_PAE != 0 {
            self.walk_pae(linear, access, user)
        } else {
            self.walk_32(linear, access, user)
        };
        result.map_err(|mut code| {
            if access == Access::Write {
                code |= pf::WRITE;
            }
            if user {
                code |= pf::USER;
            }
            let nx = self.st.efer & cr::EFER_NXE != 0 && self.st.cr4 & cr::CR4_PAE != 0;
            let nx = nx || self.st.cr4 & cr::CR4_SMEP != 0;
            if access == Access::Fetch && nx {
                code |= pf::FETCH;
            }
            Fault::page(linear, code)
        })
    }

    /// The page-directory pointers of PAE paging have no rights of their own. Those that are
    /// wrong are met at each access where a task switch has loaded CR3, or memory has changed.
    fn walk_pae(&mut self, linear: u64, access: Access, user: bool) -> Result<Walk, u32> {
        let pdpte = self.pdpte(self.st.cr3, linear >> 30 & 3);
        if pdpte & PTE_P == 0 {
            return Err(0);
        }
        if pdpte & PDPTE_RESERVED != 0 {
            return Err(pf::PRESENT | pf::RESERVED);
        }
        self.walk_levels(linear, access, user, pdpte & PHYS_MASK & !0xFFF, 2)
    }

    fn pdpte(&self, cr3: u64, index: u64) -> u64 {
        self.read_entry((cr3 & 0xFFFF_FFE0) + index * 8).unwrap_or(0)
    }

    /// #GP(0) where PAE paging cannot begin with this CR3 (SDM 3A, 4.4.1).
    pub fn check_pdptes(&self, cr3: u64) -> R<()> {
        let wrong = |pdpte: u64| pdpte & PTE_P != 0 && pdpte & PDPTE_RESERVED != 0;
        if (0..4).any(|index| wrong(self.pdpte(cr3, index))) { gp(0) } else { Ok(()) }
    }

    fn walk_levels(
        &mut self,
        linear: u64,
        access: Access,
        user: bool,
        root: u64,
        levels: u32,
    ) -> Result<Walk, u32> {
        let nxe = self.st.efer & cr::EFER_NXE != 0;
        let mut reserved = !PHYS_MASK & 0x000F_FFFF_FFFF_F000 | if nxe { 0 } else { PTE_NX };
        if levels < 4 {
            // What four levels leave to software is reserved (SDM 3A, table 4-10).
            reserved |= 0x7FF0_0000_0000_0000;
        }
        'again: loop {
            let mut table = root;
            let (mut rights, mut nx) = (PTE_W | PTE_U, false);
            let mut level = levels;
            loop {
                level -= 1;
                let shift = 12 + 9 * level;
                let slot = table + (linear >> shift & 0x1FF) * 8;
                // A table outside RAM reads as if nothing were there.
                let Some(entry) = self.read_entry(slot) else { return Err(0) };
                if entry & PTE_P == 0 {
                    return Err(0);
                }
                let leaf = level == 0 || level < 3 && entry & PTE_PS != 0;
                let mut bad = reserved;
                if level == 3 || level == 2 && !self.vm.cpuid.gib_pages() {
                    bad |= PTE_PS;
                } else if leaf && level > 0 {
                    // Bits between the PAT bit (12) and the frame of a large page.
                    bad |= ((1 << shift) - 1) & !0x1FFF;
                }
                if entry & bad != 0 {
                    return Err(pf::PRESENT | pf::RESERVED);
                }
                rights &= entry;
                nx |= entry & PTE_NX != 0;
                if !leaf {
                    if entry & PTE_A == 0 && !self.set_bits(slot, entry, PTE_A) {
                        continue 'again;
                    }
                    table = entry & PHYS_MASK & !0xFFF;
                    continue;
                }
                let writable = self.check(rights, nx, access, user)?;
                let dirty = if access == Access::Write { PTE_D } else { 0 };
                let need = PTE_A | dirty;
                if entry & need != need && !self.set_bits(slot, entry, need) {
                    continue 'again;
                }
                let size = 1u64 << shift;
                let frame = entry & PHYS_MASK & !(size - 1);
                return Ok(Walk {
                    address: GuestPhys(frame | linear & (size - 1)),
                    writable: writable && (entry | dirty) & PTE_D != 0,
                    global: entry & PTE_G != 0 && self.st.cr4 & cr::CR4_PGE != 0,
                    size,
                });
            }
        }
    }

    /// 32-bit paging (SDM 3A, 4.3).
    fn walk_32(&mut self, linear: u64, access: Access, user: bool) -> Result<Walk, u32> {
        'again: loop {
            let mut rights = PTE_W | PTE_U;
            let mut slot = (self.st.cr3 & 0xFFFF_F000) + (linear >> 22 & 0x3FF) * 4;
            for level in [1, 0] {
                let Some(entry) = self.read_entry_32(slot) else { return Err(0) };
                if entry & PTE_P == 0 {
                    return Err(0);
                }
                rights &= entry;
                let large = entry & PTE_PS != 0 && self.st.cr4 & cr::CR4_PSE != 0;
                if level == 1 && !large {
                    if entry & PTE_A == 0 && !self.set_bits_32(slot, entry, PTE_A) {
                        continue 'again;
                    }
                    slot = (entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4;
                    continue;
                }
                if level == 1 && entry & PDE_4M_RESERVED != 0 {
                    return Err(pf::PRESENT | pf::RESERVED);
                }
                let writable = self.check(rights, false, access, user)?;
                let dirty = if access == Access::Write { PTE_D } else { 0 };
                let need = PTE_A | dirty;
                if entry & need != need && !self.set_bits_32(slot, entry, need) {
                    continue 'again;
                }
                let (frame, size) = if level == 1 {
                    // PSE-36: bits 39:32 of the frame are in bits 20:13.
                    (entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32, 1u64 << 22)
                } else {
                    (entry & 0xFFFF_F000, PAGE_SIZE)
                };
                return Ok(Walk {
                    address: GuestPhys(frame | linear & (size - 1)),
                    writable: writable && (entry | dirty) & PTE_D != 0,
                    global: entry & PTE_G != 0 && self.st.cr4 & cr::CR4_PGE != 0,
                    size,
                });
            }
        }
    }

    /// Access rights (SDM 3A, 4.6). Returns whether the page may be written.
    fn check(&self, rights: u64, nx: bool, access: Access, user: bool) -> Result<bool, u32> {
        let user_page = rights & PTE_U != 0;
        let writable = rights & PTE_W != 0 || !user && self.st.cr0 & cr::CR0_WP == 0;
        let allowed = match access {
            _ if user && !user_page => false,
            Access::Read => true,
            Access::Write => writable,
            Access::Fetch => !nx && (user || !user_page || self.st.cr4 & cr::CR4_SMEP == 0),
        };
        if allowed { Ok(writable) } else { Err(pf::PRESENT) }
    }

    fn entry_cell(&self, slot: u64) -> Option<&AtomicU64> {
        let host = self.vm.memory.host(GuestPhys(slot), 8)?;
        // SAFETY: eight mapped bytes, aligned since `slot` is a multiple of 8 and
        // regions start on pages; shared with other vCPUs only as atomics.
        Some(unsafe { AtomicU64::from_ptr(host.cast()) })
    }

    fn entry_cell_32(&self, slot: u64) -> Option<&AtomicU32> {
        let host = self.vm.memory.host(GuestPhys(slot), 4)?;
        // SAFETY: as above, for four bytes.
        Some(unsafe { AtomicU32::from_ptr(host.cast()) })
    }

    fn read_entry(&self, slot: u64) -> Option<u64> {
        Some(self.entry_cell(slot)?.load(Ordering::Acquire))
    }

    fn read_entry_32(&self, slot: u64) -> Option<u64> {
        Some(u64::from(self.entry_cell_32(slot)?.load(Ordering::Acquire)))
    }

    /// Sets A or D; false if another CPU changed the entry since it was read.
    fn set_bits(&self, slot: u64, old: u64, bits: u64) -> bool {
        let done = self.entry_cell(slot).is_some_and(|cell| {
            cell.compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        self.vm.dirty.mark(GuestPhys(slot));
        self.vm.code.wrote(GuestPhys(slot), 8);
        done
    }

    fn set_bits_32(&self, slot: u64, old: u64, bits: u64) -> bool {
        let (old, new) = (old as u32, (old | bits) as u32);
        let done = self.entry_cell_32(slot).is_some_and(|cell| {
            cell.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        self.vm.dirty.mark(GuestPhys(slot));
        self.vm.code.wrote(GuestPhys(slot), 4);
        done
    }

    /// Drops what is known of guest memory if regions came or went while the
    /// vCPU stood.
    pub fn follow_memory(&mut self) {
        let generation = self.vm.memory.generation();
        if self.tlb.generation != generation {
            self.tlb.generation = generation;
            self.tlb.flush(true);
        }
    }

    /// Does what is asked of the vCPU's tables.
    pub fn obey(&mut self, orders: &Orders) {
        if orders.all_pages {
            self.tlb.drop_writes();
        }
        for &page in &orders.pages {
            self.tlb.protect_host_page(page);
        }
    }

    /// Makes `linear` hit in the TLB if it may: the page is RAM and, for
    /// writing, holds no translated code. Returns where the byte is.
    pub fn fill_tlb(&mut self, linear: u64, write: bool, user: bool) -> Result<Place, Fault> {
        self.counts.tlb_misses += 1;
        if let Some(address) = self.tlb.device(linear, write, user) {
            return Ok(Place::Device(address));
        }
        if self.st.long_mode() && !canonical(linear) {
            return Err(Fault::with_error(vector::GP, 0));
        }
        let access = if write { Access::Write } else { Access::Read };
        let walk = self.walk(linear, access, user)?;
        let page = GuestPhys(walk.address.0 & !0xFFF);
        // RAM first: an APIC page that a guest moves over RAM is not seen there.
        let Some(host) = self.vm.memory.host(page, PAGE_SIZE) else {
            self.tlb.fill_device(linear, page, write, user);
            return Ok(Place::Device(walk.address));
        };
        if walk.size > PAGE_SIZE {
            self.tlb.note_large(linear, walk.size);
        }
        let place = host.wrapping_add(walk.address.page_offset() as usize);
        let code = self.vm.code.has_code(page);
        if write {
            self.vm.dirty.mark(page);
            if code {
                return Ok(Place::Code(place, walk.address));
            }
            self.tlb.fill(linear, host, user, true, walk.global);
            return Ok(Place::Ram(place));
        }
        self.tlb.fill(linear, host, user, false, walk.global);
        // What is read is often written next; spare that walk.
        if walk.writable && !code && !self.vm.dirty.waits_for(page) {
            self.tlb.fill(linear, host, user, true, walk.global);
        }
        Ok(Place::Ram(place))
    }

    /// Where `size` bytes inside one page are.
    #[inline]
    fn place(&mut self, linear: u64, write: bool, user: bool) -> Result<Place, Fault> {
        match self.tlb.lookup(linear, user, write) {
            Some(host) => Ok(Place::Ram(host)),
            None => {
                self.counts.slow_accesses += 1;
                self.fill_tlb(linear, write, user)
            }
        }
    }

    /// Loads 1, 2, 4 or 8 bytes at a linear address.
    pub fn load(&mut self, linear: u64, size: usize, user: bool) -> R<u64> {
        if crosses(linear, size) {
            let mut bytes = [0; 8];
            self.load_bytes(linear, &mut bytes[..size], user)?;
            return Ok(u64::from_le_bytes(bytes));
        }
        match self.place(linear, false, user)? {
            // SAFETY: `size` bytes inside one page of RAM.
            Place::Ram(host) | Place::Code(host, _) => Ok(unsafe { load_host(host, size) }),
            Place::Device(address) => self.device_read(address, size),
        }
    }

    /// Stores 1, 2, 4 or 8 bytes. On a fault nothing has been written.
    pub fn store(&mut self, linear: u64, size: usize, value: u64, user: bool) -> R<()> {
        if crosses(linear, size) {
            return self.store_bytes(linear, &value.to_le_bytes()[..size], user);
        }
        match self.place(linear, true, user)? {
            // SAFETY: `size` bytes inside one page of RAM.
            Place::Ram(host) => unsafe { store_host(host, size, value) },
            Place::Code(host, address) => {
                // SAFETY: as above.
                unsafe { store_host(host, size, value) };
                self.vm.code.wrote(address, size as u64);
            }
            Place::Device(address) => self.device_write(address, size, value)?,
        }
        Ok(())
    }

    /// Loads any number of bytes; may cross pages.
    pub fn load_bytes(&mut self, linear: u64, data: &mut [u8], user: bool) -> R<()> {
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & 0xFFF)) as usize);
            match self.place(at, false, user)? {
                Place::Ram(host) | Place::Code(host, _) => {
                    let part = &mut data[done..done + len];
                    // SAFETY: `len` bytes inside one page of RAM.
                    unsafe { std::ptr::copy_nonoverlapping(host, part.as_mut_ptr(), len) };
                }
                Place::Device(address) => {
                    for (index, part) in data[done..done + len].chunks_mut(8).enumerate() {
                        let value =
                            self.device_read(address.offset(index as u64 * 8), part.len())?;
                        part.copy_from_slice(&value.to_le_bytes()[..part.len()]);
                    }
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Stores any number of bytes. Every page is checked before the first write.
    pub fn store_bytes(&mut self, linear: u64, data: &[u8], user: bool) -> R<()> {
        self.probe_write(linear, data.len(), user)?;
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & 0xFFF)) as usize);
            let part = &data[done..done + len];
            match self.place(at, true, user)? {
                Place::Ram(host) => {
                    // SAFETY: `len` bytes inside one page of RAM.
                    unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), host, len) };
                }
                Place::Code(host, address) => {
                    // SAFETY: as above.
                    unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), host, len) };
                    self.vm.code.wrote(address, len as u64);
                }
                Place::Device(address) => {
                    for (index, chunk) in part.chunks(8).enumerate() {
                        let mut value = [0; 8];
                        value[..chunk.len()].copy_from_slice(chunk);
                        let at = address.offset(index as u64 * 8);
                        self.device_write(at, chunk.len(), u64::from_le_bytes(value))?;
                    }
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Faults as a write of `len` bytes would, and writes nothing.
    pub fn probe_write(&mut self, linear: u64, len: usize, user: bool) -> R<()> {
        if len == 0 {
            return Ok(());
        }
        let last = linear.wrapping_add(len as u64 - 1);
        let mut at = linear;
        loop {
            self.place(at, true, user)?;
            if at & !0xFFF == last & !0xFFF {
                return Ok(());
            }
            at = (at & !0xFFF).wrapping_add(PAGE_SIZE);
        }
    }

    /// Reads, computes, writes, as one atomic step where the bytes are RAM.
    /// `update` may run more than once. Returns the old value.
    ///
    /// An access that crosses pages is so only if it is `locked`: it then asks for the others to
    /// stand.
    pub fn read_modify_write(
        &mut self,
        linear: u64,
        size: usize,
        user: bool,
        locked: bool,
        mut update: impl FnMut(u64) -> u64,
    ) -> R<u64> {
        if crosses(linear, size) {
            self.probe_write(linear, size, user)?;
            if locked && !self.alone {
                return Err(Stop::Alone);
            }
            let old = self.load(linear, size, user)?;
            self.store(linear, size, update(old), user)?;
            return Ok(old);
        }
        let (host, code) = match self.place(linear, true, user)? {
            Place::Ram(host) => (host, None),
            Place::Code(host, address) => (host, Some(address)),
            Place::Device(address) => {
                let old = self.device_read(address, size)?;
                self.device_write(address, size, update(old))?;
                return Ok(old);
            }
        };
        // SAFETY: `size` bytes inside one page of RAM.
        let old = unsafe { update_host(host, size, &mut update) };
        if let Some(address) = code {
            self.vm.code.wrote(address, size as u64);
        }
        Ok(old)
    }

    /// The host address of 16 aligned bytes of RAM for CMPXCHG16B, else `None`. Where
    /// the page holds translated code, a write must be reported: there.
    pub fn writable_16(
        &mut self,
        linear: u64,
        user: bool,
    ) -> R<Option<(*mut u8, Option<GuestPhys>)>> {
        debug_assert!(linear.is_multiple_of(16));
        Ok(match self.place(linear, true, user)? {
            Place::Ram(host) => Some((host, None)),
            Place::Code(host, address) => Some((host, Some(address))),
            Place::Device(_) => None,
        })
    }

    /// Fetches code bytes: at least one, up to the end of `data`; stops at a page
    /// that cannot be fetched, which faults only if the instruction reaches it.
    pub fn fetch(&mut self, linear: u64, data: &mut [u8]) -> R<usize> {
        let user = self.user();
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & 0xFFF)) as usize);
            let page = at & !0xFFF;
            let known = self.tlb.fetched.filter(|f| f.linear == page && f.user == user);
            let host = if let Some(known) = known {
                Some(known.host.wrapping_add((at & 0xFFF) as usize))
            } else {
                match self.fetch_page(at, user) {
                    Ok((address, _)) => {
                        let host = self.vm.memory.host(address, len as u64);
                        self.tlb.fetched = host.map(|host| FetchedPage {
                            linear: page,
                            user,
                            host: host.wrapping_sub((at & 0xFFF) as usize),
                        });
                        host
                    }
                    Err(fault) if done == 0 => return Err(fault.into()),
                    Err(_) => return Ok(done),
                }
            };
            let Some(host) = host else {
                // Code outside RAM: the open bus reads as ones.
                if done == 0 {
                    data[..len].fill(0xFF);
                    return Ok(len);
                }
                return Ok(done);
            };
            // SAFETY: `host` has `len` mapped bytes.
            unsafe { std::ptr::copy_nonoverlapping(host, data[done..].as_mut_ptr(), len) };
            done += len;
        }
        Ok(done)
    }

    /// Translates for an instruction fetch. Returns the address and the walk.
    pub fn fetch_page(&mut self, linear: u64, user: bool) -> Result<(GuestPhys, Walk), Fault> {
        if self.st.long_mode() && !canonical(linear) {
            return Err(Fault::with_error(vector::GP, 0));
        }
        let walk = self.walk(linear, Access::Fetch, user)?;
        Ok((walk.address, walk))
    }

    /// Where the RAM is that an access at the present privilege would reach.
    pub fn access(&mut self, linear: u64, write: bool) -> Result<GuestPhys, GuestFault> {
        if self.st.long_mode() && !canonical(linear) {
            return Err(GuestFault::GP);
        }
        let access = if write { Access::Write } else { Access::Read };
        let user = self.user();
        let walk = self.walk(linear, access, user).map_err(|fault| GuestFault {
            vector: fault.vector,
            error: fault.error,
            address: fault.address,
        })?;
        match self.vm.memory.host(walk.address, 1) {
            Some(_) => Ok(walk.address),
            None => Err(GuestFault::GP),
        }
    }

    /// Reads memory as a debugger does: no rights, no A bits, RAM only.
    pub fn peek(&self, linear: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        while done < data.len() {
            let at = linear.wrapping_add(done as u64);
            let len = (data.len() - done).min((PAGE_SIZE - (at & 0xFFF)) as usize);
            let Some(address) = self.peek_walk(at) else { break };
            if self.vm.memory.read(address, &mut data[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Translates without side effects.
    pub fn peek_walk(&self, linear: u64) -> Option<GuestPhys> {
        if self.st.cr0 & cr::CR0_PG == 0 {
            return Some(GuestPhys(linear & 0xFFFF_FFFF));
        }
        let long = self.st.long_mode();
        if !long && self.st.cr4 & cr::CR4_PAE == 0 {
            let slot = (self.st.cr3 & 0xFFFF_F000) + (linear >> 22 & 0x3FF) * 4;
            let entry = self.read_entry_32(slot).filter(|e| e & PTE_P != 0)?;
            if entry & PTE_PS != 0 && self.st.cr4 & cr::CR4_PSE != 0 {
                return Some(GuestPhys(entry & 0xFFC0_0000 | linear & 0x3F_FFFF));
            }
            let slot = (entry & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4;
            let entry = self.read_entry_32(slot).filter(|e| e & PTE_P != 0)?;
            return Some(GuestPhys(entry & 0xFFFF_F000 | linear & 0xFFF));
        }
        let (mut table, levels) = if long {
            (self.st.cr3 & PHYS_MASK & !0xFFF, 4)
        } else {
            let slot = (self.st.cr3 & 0xFFFF_FFE0) + (linear >> 30 & 3) * 8;
            (self.read_entry(slot).filter(|e| e & PTE_P != 0)? & PHYS_MASK & !0xFFF, 2)
        };
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let entry = self.read_entry(table + (linear >> shift & 0x1FF) * 8)?;
            if entry & PTE_P == 0 {
                return None;
            }
            if level == 0 || level < 3 && entry & PTE_PS != 0 {
                let size = 1u64 << shift;
                return Some(GuestPhys(entry & PHYS_MASK & !(size - 1) | linear & (size - 1)));
            }
            table = entry & PHYS_MASK & !0xFFF;
        }
        None
    }

    /// Reads memory that is not RAM.
    fn device_read(&mut self, address: GuestPhys, size: usize) -> R<u64> {
        match self.read_device(address, size) {
            Ok(value) => Ok(value),
            Err(exit) => Ok(self.ask(exit)? & mask(size)),
        }
    }

    fn device_write(&mut self, address: GuestPhys, size: usize, value: u64) -> R<()> {
        match self.write_device(address, size, value) {
            Ok(()) => Ok(()),
            Err(exit) => self.ask(exit).map(drop),
        }
    }
}

/// Where the bytes of an access are.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Ram(*mut u8),
    /// RAM with translated code in its page: writes must be reported.
    Code(*mut u8, GuestPhys),
    Device(GuestPhys),
}

#[inline]
fn crosses(linear: u64, size: usize) -> bool {
    (linear & 0xFFF) + size as u64 > PAGE_SIZE
}

/// # Safety
/// `host` must have `size` (1, 2, 4 or 8) mapped bytes.
#[inline]
unsafe fn load_host(host: *mut u8, size: usize) -> u64 {
    // SAFETY: the caller's promise. Volatile: another vCPU may write meanwhile.
    unsafe {
        match size {
            1 => u64::from(host.read_volatile()),
            2 => u64::from(host.cast::<u16>().read_unaligned()),
            4 => u64::from(host.cast::<u32>().read_unaligned()),
            _ => host.cast::<u64>().read_unaligned(),
        }
    }
}

/// # Safety
/// As [`load_host`].
#[inline]
unsafe fn store_host(host: *mut u8, size: usize, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => host.write_volatile(value as u8),
            2 => host.cast::<u16>().write_unaligned(value as u16),
            4 => host.cast::<u32>().write_unaligned(value as u32),
            _ => host.cast::<u64>().write_unaligned(value),
        }
    }
}

/// # Safety
/// As [`load_host`].
unsafe fn update_host(host: *mut u8, size: usize, update: &mut impl FnMut(u64) -> u64) -> u64 {
    macro_rules! exchange {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: aligned here, mapped by the caller's promise.
            let cell = unsafe { <$atomic>::from_ptr(host.cast()) };
            let mut old = cell.load(Ordering::SeqCst);
            loop {
                let new = update(u64::from(old)) as $int;
                match cell.compare_exchange_weak(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return u64::from(old),
                    Err(now) => old = now,
                }
            }
        }};
    }
    if (host as usize).is_multiple_of(size) {
        match size {
            1 => exchange!(AtomicU8, u8),
            2 => exchange!(AtomicU16, u16),
            4 => exchange!(AtomicU32, u32),
            _ => exchange!(AtomicU64, u64),
        }
    }
    // Never of one byte, which is always aligned.
    // SAFETY: the caller's promise.
    let mut old = unsafe { load_host(host, size) };
    loop {
        let new = update(old);
        // SAFETY: the caller's promise.
        let found = unsafe { compare_exchange(host, size, old, new) };
        if found == old {
            return old;
        }
        old = found;
    }
}

/// Writes `new` if `old` is there, and returns what was, wherever it lies: Rust's atomics
/// must be aligned, a locked instruction need not be (SDM 3A, 9.1.2.2).
///
/// # Safety
/// As [`load_host`].
unsafe fn compare_exchange(host: *mut u8, size: usize, old: u64, new: u64) -> u64 {
    macro_rules! exchange {
        ($text:literal) => {{
            let found: u64;
            // SAFETY: changes memory that the caller promises, and flags.
            unsafe {
                std::arch::asm!($text, host = in(reg) host, new = in(reg) new,
                    inout("rax") old => found, options(nostack));
            }
            found & mask(size)
        }};
    }
    match size {
        2 => exchange!("lock cmpxchg word ptr [{host}], {new:x}"),
        4 => exchange!("lock cmpxchg dword ptr [{host}], {new:e}"),
        _ => exchange!("lock cmpxchg qword ptr [{host}], {new}"),
    }
}
