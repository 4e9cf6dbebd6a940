//! Gathers and masked moves: which bytes they touch depends on data, and a
//! masked element never faults, so they are done element by element.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{check_mode, class, run_registers};
use crate::cpu::Cpu;
use crate::cpu::fpu;
use crate::interp::operand;
use crate::state::Ymm;
use crate::state::fault::{R, Stop, ud};

pub fn execute(cpu: &mut Cpu, i: &Instruction) -> Option<R<()>> {
    let result = match i.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => masked_move(cpu, i, 4),
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => masked_move(cpu, i, 8),
        Mnemonic::Maskmovdqu => {
            check_mode(&cpu.st, class::SSE).and_then(|()| mask_bytes_xmm(cpu, i))
        }
        Mnemonic::Vmaskmovdqu => {
            check_mode(&cpu.st, class::AVX | class::VEX).and_then(|()| mask_bytes_xmm(cpu, i))
        }
        Mnemonic::Maskmovq => mask_bytes_mmx(cpu, i),
        // Others with the same names are EVEX forms.
        _ => match i.code() {
            Code::VEX_Vgatherdps_xmm_vm32x_xmm
            | Code::VEX_Vgatherdps_ymm_vm32y_ymm
            | Code::VEX_Vpgatherdd_xmm_vm32x_xmm
            | Code::VEX_Vpgatherdd_ymm_vm32y_ymm => gather(cpu, i, 4, 4),
            Code::VEX_Vgatherdpd_xmm_vm32x_xmm
            | Code::VEX_Vgatherdpd_ymm_vm32x_ymm
            | Code::VEX_Vpgatherdq_xmm_vm32x_xmm
            | Code::VEX_Vpgatherdq_ymm_vm32x_ymm => gather(cpu, i, 4, 8),
            Code::VEX_Vgatherqps_xmm_vm64x_xmm
            | Code::VEX_Vgatherqps_xmm_vm64y_xmm
            | Code::VEX_Vpgatherqd_xmm_vm64x_xmm
            | Code::VEX_Vpgatherqd_xmm_vm64y_xmm => gather(cpu, i, 8, 4),
            Code::VEX_Vgatherqpd_xmm_vm64x_xmm
            | Code::VEX_Vgatherqpd_ymm_vm64y_ymm
            | Code::VEX_Vpgatherqq_xmm_vm64x_xmm
            | Code::VEX_Vpgatherqq_ymm_vm64y_ymm => gather(cpu, i, 8, 8),
            _ => return None,
        },
    };
    Some(result)
}

/// Element `index` of `size` (4 or 8) bytes.
fn element(ymm: &Ymm, index: usize, size: usize) -> u64 {
    let at = index * size;
    let quad = ymm.0[at / 8];
    if size == 8 { quad } else { quad >> (at % 8 * 8) & 0xFFFF_FFFF }
}

fn set_element(ymm: &mut Ymm, index: usize, size: usize, value: u64) {
    let at = index * size;
    let quad = &mut ymm.0[at / 8];
    if size == 8 {
        *quad = value;
    } else {
        let shift = at % 8 * 8;
        *quad = *quad & !(0xFFFF_FFFF << shift) | (value & 0xFFFF_FFFF) << shift;
    }
}

fn sign(ymm: &Ymm, index: usize, size: usize) -> bool {
    element(ymm, index, size) >> (size * 8 - 1) & 1 != 0
}

fn vec(cpu: &Cpu, register: Register) -> Ymm {
    cpu.st.vec[register.number() % 16]
}

fn address_mask(i: &Instruction) -> u64 {
    match operand::address_size(i) {
        2 => 0xFFFF,
        4 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q (Intel SDM 2, VMASKMOV).
fn masked_move(cpu: &mut Cpu, i: &Instruction, size: usize) -> R<()> {
    check_mode(&cpu.st, class::AVX | class::VEX)?;
    let user = cpu.user();
    let store = i.op_kind(0) == OpKind::Memory;
    let (mask, data) = if store { (1, 2) } else { (1, 0) };
    let register = i.op_register(data);
    let mask = vec(cpu, i.op_register(mask));
    let count = register.size() / size;
    let offset = operand::effective_address(cpu, i);
    let mut addresses = [None; 8];
    for (index, address) in addresses.iter_mut().enumerate().take(count) {
        if sign(&mask, index, size) {
            let at = offset.wrapping_add((index * size) as u64) & address_mask(i);
            let at = operand::linear(cpu, i.memory_segment(), at, size, store)?;
            if store {
                cpu.probe_write(at, size, user)?;
            }
            *address = Some(at);
        }
    }
    let mut value = if store { vec(cpu, register) } else { Ymm::default() };
    for (index, address) in addresses.into_iter().enumerate() {
        let Some(at) = address else { continue };
        if store {
            cpu.store(at, size, element(&value, index, size), user)?;
        } else {
            let loaded = cpu.load(at, size, user)?;
            set_element(&mut value, index, size, loaded);
        }
    }
    if !store {
        cpu.st.vec[register.number() % 16] = value;
    }
    Ok(())
}

/// VGATHER and VPGATHER by VEX (Intel SDM 2, VPGATHERDD). Elements that were
/// loaded before a fault stay, with their mask cleared.
fn gather(cpu: &mut Cpu, i: &Instruction, index_size: usize, size: usize) -> R<()> {
    check_mode(&cpu.st, class::AVX | class::VEX)?;
    let (to, by, mask) = (i.op0_register(), i.memory_index(), i.op2_register());
    let numbers = [to.number(), by.number(), mask.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return ud();
    }
    let user = cpu.user();
    let count = (to.size() / size).min(by.size() / index_size);
    let base = operand::read_reg(cpu, i.memory_base());
    let start = base.wrapping_add(i.memory_displacement64());
    let indices = vec(cpu, by);
    let (mut value, mut left) = (vec(cpu, to), vec(cpu, mask));
    let mut result = Ok(());
    for index in 0..count {
        if !sign(&left, index, size) {
            continue;
        }
        let mut by = element(&indices, index, index_size);
        if index_size == 4 {
            by = by as i32 as u64;
        }
        let offset = start.wrapping_add(by.wrapping_mul(u64::from(i.memory_index_scale())));
        let loaded = operand::linear(cpu, i.memory_segment(), offset & vsib_mask(i), size, false)
            .and_then(|at| cpu.load(at, size, user));
        match loaded {
            Ok(loaded) => {
                set_element(&mut value, index, size, loaded);
                set_element(&mut left, index, size, 0);
            }
            Err(stop) => {
                result = Err(stop);
                break;
            }
        }
    }
    match result {
        Ok(()) => {
            for quad in &mut value.0[(count * size).div_ceil(8)..] {
                *quad = 0;
            }
            left = Ymm::default();
        }
        // The instruction starts again with the answer in the replay log.
        Err(Stop::Exit(_)) => return result,
        Err(_) => {}
    }
    cpu.st.vec[to.number() % 16] = value;
    cpu.st.vec[mask.number() % 16] = left;
    result
}

/// Truncation of a VSIB address: the index says nothing about its size.
fn vsib_mask(i: &Instruction) -> u64 {
    let base = i.memory_base();
    let wide = match base {
        Register::None => i.memory_displ_size() == 8,
        base => base.size() == 8,
    };
    if wide { u64::MAX } else { 0xFFFF_FFFF }
}

/// MASKMOVDQU and VMASKMOVDQU: bytes to `DS:[rDI]`, or to the segment of a prefix.
fn mask_bytes_xmm(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    let data = fpu::half(&vec(cpu, i.op_register(1)), 0);
    let mask = fpu::half(&vec(cpu, i.op_register(2)), 0);
    store_masked(cpu, i, &data, &mask)
}

fn mask_bytes_mmx(cpu: &mut Cpu, i: &Instruction) -> R<()> {
    check_mode(&cpu.st, class::MMX)?;
    // Reading a register makes the transition to MMX state: #MF if one is pending,
    // TOP = 0, so that the image has MM0 first (Intel SDM 1, 9.5). A write would
    // also set the exponent of the register that it writes.
    let rax = cpu.st.gpr[0];
    let reading =
        Instruction::with2(Code::Movq_rm64_mm, Register::RAX, Register::MM0).or_else(|_| ud())?;
    let read = run_registers(cpu, &reading);
    cpu.st.gpr[0] = rax;
    read?;
    let image = fpu::x87(&cpu.st);
    let register = |op| {
        let at = fpu::FX_ST + i.op_register(op).number() % 8 * 16;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&image.0[at..at + 8]);
        bytes
    };
    store_masked(cpu, i, &register(1), &register(2))
}

fn store_masked(cpu: &mut Cpu, i: &Instruction, data: &[u8], mask: &[u8]) -> R<()> {
    let user = cpu.user();
    let (register, limit) = match i.op_kind(0) {
        OpKind::MemorySegDI => (Register::DI, 0xFFFF),
        OpKind::MemorySegEDI => (Register::EDI, 0xFFFF_FFFF),
        _ => (Register::RDI, u64::MAX),
    };
    let start = operand::read_reg(cpu, register);
    let mut addresses = [None; 16];
    for (index, (address, mask)) in addresses.iter_mut().zip(mask).enumerate() {
        if mask & 0x80 != 0 {
            let at = start.wrapping_add(index as u64) & limit;
            let at = operand::linear(cpu, i.memory_segment(), at, 1, true)?;
            cpu.probe_write(at, 1, user)?;
            *address = Some(at);
        }
    }
    for (address, &byte) in addresses.into_iter().zip(data) {
        if let Some(at) = address {
            cpu.store(at, 1, u64::from(byte), user)?;
        }
    }
    Ok(())
}
