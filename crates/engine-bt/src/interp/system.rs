//! Privileged instructions and those that read system state (Intel SDM 2A-2B;
//! 3A, chapters 2, 4, 10 and 3B, chapter 18).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use tetrarch_engine::{Exit, SegmentTable};

use super::segment::system_type;
use super::{Flow, far, io, operand, platform, segment, syscall};
use crate::cpu::Cpu;
use crate::cpu::cpuid::Vendor;
use crate::cpu::fpu;
use crate::cpu::msr;
use crate::state::address::PHYS_BITS;
use crate::state::address::canonical;
use crate::state::fault::{Fault, R, gp, ud};
use crate::state::{attr, cr, reg, seg};

/// The bits of CR0 that exist; others read as 0.
const CR0_BITS: u64 = cr::CR0_PE
    | cr::CR0_MP
    | cr::CR0_EM
    | cr::CR0_TS
    | cr::CR0_ET
    | cr::CR0_NE
    | cr::CR0_WP
    | cr::CR0_AM
    | cr::CR0_NW
    | cr::CR0_CD
    | cr::CR0_PG;
/// A change of one of these changes what page tables mean.
const CR4_PAGING: u64 = cr::CR4_PSE | cr::CR4_PAE | cr::CR4_PGE | cr::CR4_SMEP;

/// DR6: bits that are always 1, and those that can be written (SDM 3B, 18.2.3).
const DR6_ONES: u64 = 0xFFFF_0FF0;
const DR6_BITS: u64 = 0xE00F;
const DR6_BD: u64 = 1 << 13;
/// DR7: bit 10 is always 1; bits 11, 12, 14 and 15 are 0.
const DR7_ONES: u64 = 0x400;
const DR7_BITS: u64 = 0xFFFF_23FF;
const DR7_GD: u64 = 1 << 13;

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    if let Some(result) = own(cpu, i) {
        return Some(result);
    }
    far::execute(cpu, i)
        .or_else(|| segment::execute(cpu, i))
        .or_else(|| io::execute(cpu, i))
        .or_else(|| syscall::execute(cpu, i))
}

fn own(cpu: &mut Cpu, i: &Instruction) -> Option<R<Flow>> {
    use Mnemonic as M;
    let result = match i.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => mov_from_cr(cpu, i),
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => mov_to_cr(cpu, i),
        Code::Mov_r32_dr | Code::Mov_r64_dr => mov_from_dr(cpu, i),
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => mov_to_dr(cpu, i),
        _ => match i.mnemonic() {
            M::Lmsw => lmsw(cpu, i),
            M::Smsw => smsw(cpu, i),
            M::Clts => privileged(cpu).map(|()| {
                cpu.st.cr0 &= !cr::CR0_TS;
                cpu.update_mode();
            }),
            M::Lgdt => load_table(cpu, i).map(|table| cpu.st.gdt = table),
            M::Lidt => load_table(cpu, i).map(|table| cpu.st.idt = table),
            M::Sgdt => store_table(cpu, i, cpu.st.gdt),
            M::Sidt => store_table(cpu, i, cpu.st.idt),
            M::Rdpid => {
                operand::write_reg(cpu, i.op0_register(), cpu.st.tsc_aux);
                Ok(())
            }
            M::Invlpg => invlpg(cpu, i),
            M::Invd | M::Wbinvd => privileged(cpu),
            M::Hlt => privileged(cpu).map(|()| cpu.st.halted = 1),
            M::Cpuid => {
                cpuid(cpu);
                Ok(())
            }
            M::Rdtsc => rdtsc(cpu),
            M::Rdtscp => rdtsc(cpu).map(|()| cpu.st.gpr[reg::RCX] = cpu.st.tsc_aux),
            // There are no counters: each ECX is out of range.
            M::Rdpmc => gp(0),
            M::Rdmsr => return Some(privileged(cpu).and_then(|()| rdmsr(cpu))),
            M::Wrmsr => return Some(privileged(cpu).and_then(|()| wrmsr(cpu))),
            M::Swapgs => privileged(cpu).map(|()| {
                let st = &mut *cpu.st;
                std::mem::swap(&mut st.seg[seg::GS].base, &mut st.kernel_gs_base);
            }),
            M::Rdfsbase => read_base(cpu, i, seg::FS),
            M::Rdgsbase => read_base(cpu, i, seg::GS),
            M::Wrfsbase => write_base(cpu, i, seg::FS),
            M::Wrgsbase => write_base(cpu, i, seg::GS),
            M::Xgetbv => xgetbv(cpu),
            M::Xsetbv => xsetbv(cpu),
            // Hints where MPX is hidden (SDM 1, appendix E.4).
            M::Bndcl | M::Bndcn | M::Bndcu | M::Bndldx | M::Bndmk | M::Bndmov | M::Bndstx => Ok(()),
            _ => return None,
        },
    };
    Some(result.map(|()| Flow::Next))
}

/// #GP(0) outside of CPL 0. Real mode runs at CPL 0, virtual-8086 mode at 3.
fn privileged(cpu: &Cpu) -> R<()> {
    if cpu.st.cpl == 0 { Ok(()) } else { gp(0) }
}

fn mov_from_cr(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    privileged(cpu)?;
    let value = match i.op1_register() {
        Register::CR0 => cpu.st.cr0,
        Register::CR2 => cpu.st.cr2,
        Register::CR3 => cpu.st.cr3,
        Register::CR4 => cpu.st.cr4,
        Register::CR8 => u64::from(cpu.vm.irqchip.cr8(cpu.id)),
        _ => return ud(),
    };
    operand::write_reg(cpu, i.op0_register(), value);
    Ok(())
}

fn mov_to_cr(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    privileged(cpu)?;
    let value = operand::read_reg(cpu, i.op1_register());
    match i.op0_register() {
        Register::CR0 => write_cr0(cpu, value),
        Register::CR2 => {
            cpu.st.cr2 = value;
            Ok(())
        }
        Register::CR3 => write_cr3(cpu, value),
        Register::CR4 => write_cr4(cpu, value),
        Register::CR8 => {
            if value > 15 {
                return gp(0);
            }
            cpu.vm.irqchip.set_cr8(cpu.id, value as u8);
            Ok(())
        }
        _ => ud(),
    }
}

/// CR0 (SDM 3A, 2.5), with entry to and exit from long mode (SDM 3A, 10.8.5).
pub fn write_cr0(cpu: &mut Cpu, value: u64) -> R<()> {
    let old = cpu.st.cr0;
    let new = value & CR0_BITS | cr::CR0_ET;
    let paging = new & cr::CR0_PG != 0;
    if value >> 32 != 0
        || paging && new & cr::CR0_PE == 0
        || new & (cr::CR0_CD | cr::CR0_NW) == cr::CR0_NW
    {
        return gp(0);
    }
    if (new ^ old) & cr::CR0_PG != 0 {
        if paging && cpu.st.efer & cr::EFER_LME != 0 {
            let code64 = cpu.st.seg[seg::CS].attributes & attr::L != 0;
            let kind = cpu.st.seg[seg::TR].attributes & attr::TYPE;
            // Intel's CPUs alone look at the TSS (SDM 2B, "MOV to Control Registers").
            let tss16 = matches!(kind, system_type::TSS16_AVAILABLE | system_type::TSS16_BUSY)
                && cpu.vm.cpuid.vendor() == Vendor::Intel;
            if cpu.st.cr4 & cr::CR4_PAE == 0 || code64 || tss16 {
                return gp(0);
            }
            cpu.st.efer |= cr::EFER_LMA;
        } else if !paging {
            if cpu.st.code64() {
                return gp(0);
            }
            cpu.st.efer &= !cr::EFER_LMA;
        }
    }
    if paging && (new ^ old) & (cr::CR0_PG | cr::CR0_CD | cr::CR0_NW) != 0 {
        check_pdptes(cpu, cpu.st.cr3, cpu.st.cr4)?;
    }
    cpu.st.cr0 = new;
    // WP decides which pages have write entries.
    if (new ^ old) & (cr::CR0_PG | cr::CR0_WP | cr::CR0_PE) != 0 {
        cpu.tlb.flush(true);
    }
    cpu.update_mode();
    Ok(())
}

/// Of a load of CR3, or of bits that load the page-directory pointers of PAE paging again.
fn check_pdptes(cpu: &Cpu, cr3: u64, cr4: u64) -> R<()> {
    let pae = cr4 & cr::CR4_PAE != 0 && cpu.st.efer & cr::EFER_LME == 0;
    if pae { cpu.check_pdptes(cr3) } else { Ok(()) }
}

fn write_cr3(cpu: &mut Cpu, value: u64) -> R<()> {
    if cpu.st.long_mode() && value >> PHYS_BITS != 0 {
        return gp(0);
    }
    if cpu.st.cr0 & cr::CR0_PG != 0 {
        check_pdptes(cpu, value, cpu.st.cr4)?;
    }
    cpu.st.cr3 = value;
    cpu.tlb.flush(false);
    Ok(())
}

fn write_cr4(cpu: &mut Cpu, value: u64) -> R<()> {
    let old = cpu.st.cr4;
    let loses_pae = cpu.st.long_mode() && value & cr::CR4_PAE == 0;
    if value & !cpu.vm.cpuid.cr4_mask() != 0 || loses_pae {
        return gp(0);
    }
    if (value ^ old) & CR4_PAGING != 0 && cpu.st.cr0 & cr::CR0_PG != 0 {
        check_pdptes(cpu, cpu.st.cr3, value)?;
    }
    cpu.st.cr4 = value;
    if (value ^ old) & CR4_PAGING != 0 {
        cpu.tlb.flush(true);
    }
    cpu.update_mode();
    Ok(())
}

/// LMSW sets PE, MP, EM and TS; it cannot clear PE.
fn lmsw(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    privileged(cpu)?;
    let value = read_word(cpu, i)?;
    let old = cpu.st.cr0;
    write_cr0(cpu, old & !0xE | value & 0xF)
}

fn smsw(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    segment::umip(cpu)?;
    let value = cpu.st.cr0;
    if i.op0_kind() == OpKind::Register {
        operand::write_reg(cpu, i.op0_register(), value);
        return Ok(());
    }
    operand::store_mem(cpu, i, 2, value & 0xFFFF)
}

fn read_word(cpu: &mut Cpu, i: &Instruction) -> R<u64> {
    if i.op0_kind() == OpKind::Register {
        return Ok(operand::read_reg(cpu, i.op0_register()) & 0xFFFF);
    }
    operand::load_mem(cpu, i, 2)
}

/// Which of DR0-DR7 a name means: DR4 and DR5 are aliases unless CR4.DE.
fn debug_register(cpu: &mut Cpu, register: Register) -> R<usize> {
    let number = register as usize - Register::DR0 as usize;
    match number {
        4 | 5 if cpu.st.cr4 & cr::CR4_DE != 0 => return ud(),
        8.. => return ud(),
        _ => {}
    }
    privileged(cpu)?;
    if cpu.st.dr[7] & DR7_GD != 0 {
        return Err(Fault::debug(DR6_BD).into());
    }
    Ok(if number == 4 || number == 5 { number + 2 } else { number })
}

fn mov_from_dr(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let number = debug_register(cpu, i.op1_register())?;
    let value = cpu.st.dr[number];
    operand::write_reg(cpu, i.op0_register(), value);
    Ok(())
}

fn mov_to_dr(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let number = debug_register(cpu, i.op0_register())?;
    let value = operand::read_reg(cpu, i.op1_register());
    if number >= 6 && value >> 32 != 0 {
        return gp(0);
    }
    cpu.st.dr[number] = match number {
        6 => value & DR6_BITS | DR6_ONES,
        7 => value & DR7_BITS | DR7_ONES,
        _ => value,
    };
    cpu.update_mode();
    Ok(())
}

/// Bytes of the base in the operand of LGDT and its kin.
fn table_base_size(i: &Instruction) -> usize {
    match i.code() {
        Code::Lgdt_m1664 | Code::Lidt_m1664 | Code::Sgdt_m1664 | Code::Sidt_m1664 => 8,
        _ => 4,
    }
}

fn load_table(cpu: &mut Cpu, i: &Instruction) -> R<SegmentTable> {
    privileged(cpu)?;
    let size = table_base_size(i);
    let address = operand::mem_linear(cpu, i, size + 2, false)?;
    let mut bytes = [0; 10];
    cpu.load_bytes(address, &mut bytes[..size + 2], false)?;
    let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
    let mut base = [0; 8];
    base[..size].copy_from_slice(&bytes[2..size + 2]);
    let mut base = u64::from_le_bytes(base);
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xFF_FFFF;
    }
    if size == 8 && !canonical(base) {
        return gp(0);
    }
    Ok(SegmentTable { base, limit })
}

fn store_table(cpu: &mut Cpu, i: &Instruction, table: SegmentTable) -> R<()> {
    segment::umip(cpu)?;
    let size = table_base_size(i);
    let address = operand::mem_linear(cpu, i, size + 2, true)?;
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let user = cpu.user();
    cpu.store_bytes(address, &bytes[..size + 2], user)
}

fn invlpg(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    privileged(cpu)?;
    let offset = operand::effective_address(cpu, i);
    let base = match i.memory_segment() {
        s @ (Register::FS | Register::GS) => cpu.st.seg[operand::segment_index(s)].base,
        _ if cpu.st.code64() => 0,
        s => cpu.st.seg[operand::segment_index(s)].base,
    };
    let mut linear = base.wrapping_add(offset);
    if !cpu.st.code64() {
        linear &= 0xFFFF_FFFF;
    }
    // In non-canonical form it does nothing (SDM 2A, "INVLPG").
    if canonical(linear) {
        cpu.tlb.flush_page(linear);
    }
    Ok(())
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.st.gpr[reg::RAX] = value & 0xFFFF_FFFF;
    cpu.st.gpr[reg::RDX] = value >> 32;
}

fn edx_eax(cpu: &Cpu) -> u64 {
    cpu.st.gpr[reg::RAX] & 0xFFFF_FFFF | cpu.st.gpr[reg::RDX] << 32
}

/// CPUID: EAX and ECX in, EAX EBX ECX EDX out.
fn cpuid(cpu: &mut Cpu) {
    let (leaf, subleaf) = (cpu.st.gpr[reg::RAX] as u32, cpu.st.gpr[reg::RCX] as u32);
    let [a, b, c, d] = cpu.cpuid(leaf, subleaf);
    let gpr = &mut cpu.st.gpr;
    gpr[reg::RAX] = u64::from(a);
    gpr[reg::RBX] = u64::from(b);
    gpr[reg::RCX] = u64::from(c);
    gpr[reg::RDX] = u64::from(d);
}

fn rdtsc(cpu: &mut Cpu) -> R<()> {
    if cpu.st.cr4 & cr::CR4_TSD != 0 && cpu.st.cpl != 0 {
        return gp(0);
    }
    let tsc = cpu.tsc();
    set_edx_eax(cpu, tsc);
    Ok(())
}

fn rdmsr(cpu: &mut Cpu) -> R<Flow> {
    let index = cpu.st.gpr[reg::RCX] as u32;
    if cpu.vm.platform.answers_msr(index) {
        let reply = cpu.replay.ask_platform(Exit::MsrRead { index })?;
        return platform::complete(cpu, reply, set_edx_eax);
    }
    let value = msr::read(cpu, index)?;
    set_edx_eax(cpu, value);
    Ok(Flow::Next)
}

fn wrmsr(cpu: &mut Cpu) -> R<Flow> {
    let index = cpu.st.gpr[reg::RCX] as u32;
    let value = edx_eax(cpu);
    if cpu.vm.platform.answers_msr(index) {
        let reply = cpu.replay.ask_platform(Exit::MsrWrite { index, value })?;
        return platform::complete(cpu, reply, |_, _| {});
    }
    msr::write(cpu, index, value).map(|()| Flow::Next)
}

/// RDFSBASE and its kin are #UD unless CR4.FSGSBASE.
fn fsgsbase(cpu: &Cpu) -> R<()> {
    if cpu.st.cr4 & cr::CR4_FSGSBASE != 0 { Ok(()) } else { ud() }
}

fn read_base(cpu: &mut Cpu, i: &Instruction, index: usize) -> R<()> {
    fsgsbase(cpu)?;
    let base = cpu.st.seg[index].base;
    operand::write_reg(cpu, i.op0_register(), base);
    Ok(())
}

fn write_base(cpu: &mut Cpu, i: &Instruction, index: usize) -> R<()> {
    fsgsbase(cpu)?;
    let base = operand::read_reg(cpu, i.op0_register());
    if !canonical(base) {
        return gp(0);
    }
    cpu.st.seg[index].base = base;
    Ok(())
}

fn xgetbv(cpu: &mut Cpu) -> R<()> {
    if cpu.st.cr4 & cr::CR4_OSXSAVE == 0 {
        return ud();
    }
    let xcr0 = cpu.st.xcr0;
    let value = match cpu.st.gpr[reg::RCX] as u32 {
        0 => xcr0,
        // XCR0 and XINUSE (SDM 1, 13.6).
        1 if cpu.vm.cpuid.xgetbv_in_use() => {
            xcr0 & fpu::in_use(&cpu.st, &fpu::x87(&cpu.st), cpu.st.vec.len())
        }
        _ => return gp(0),
    };
    set_edx_eax(cpu, value);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu) -> R<()> {
    if cpu.st.cr4 & cr::CR4_OSXSAVE == 0 {
        return ud();
    }
    privileged(cpu)?;
    let value = edx_eax(cpu);
    let avx_without_sse = value & 6 == 4;
    if cpu.st.gpr[reg::RCX] as u32 != 0
        || value & 1 == 0
        || avx_without_sse
        || value & !cpu.vm.cpuid.xcr0_mask() != 0
    {
        return gp(0);
    }
    cpu.st.xcr0 = value;
    cpu.update_mode();
    Ok(())
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
