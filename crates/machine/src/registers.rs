//! Registers by name, as one walk that reads and sets them.

use std::collections::BTreeMap;
use std::fmt;

use tetrarch_engine::{EngineError, Registers, Segment, SegmentTable, SystemRegisters, Vcpu};

/// General register names in encoding order, as `Registers::gpr` counts them.
pub const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// A register's place, with its width.
pub enum Field<'a> {
    U16(&'a mut u16),
    U32(&'a mut u32),
    U64(&'a mut u64),
}

impl Field<'_> {
    fn get(&self) -> u64 {
        match self {
            Self::U16(field) => u64::from(**field),
            Self::U32(field) => u64::from(**field),
            Self::U64(field) => **field,
        }
    }

    /// False where the value does not fit.
    fn set(&mut self, value: u64) -> bool {
        match self {
            Self::U16(field) => u16::try_from(value).map(|value| **field = value).is_ok(),
            Self::U32(field) => u32::try_from(value).map(|value| **field = value).is_ok(),
            Self::U64(field) => {
                **field = value;
                true
            }
        }
    }
}

/// Why a register cannot be set.
#[derive(Debug, thiserror::Error)]
enum BadRegister {
    #[error("{value:#x} is too large for register {name}")]
    TooLarge { name: String, value: u64 },
    #[error("there is no register '{0}'")]
    Unknown(String),
}

/// All that cannot be set of what was asked for.
#[derive(Debug, thiserror::Error)]
pub struct BadRegisters(Vec<BadRegister>);

impl fmt::Display for BadRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, bad) in self.0.iter().enumerate() {
            write!(f, "{}{bad}", if index == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq)]
pub struct State {
    pub general: Registers,
    pub system: SystemRegisters,
}

impl State {
    pub fn of(vcpu: &mut dyn Vcpu) -> Result<Self, EngineError> {
        Ok(Self { general: vcpu.registers()?, system: vcpu.system_registers()? })
    }

    /// Hands what changed since `old` to the vCPU. The system registers go
    /// first, since they alone can be refused.
    pub fn store(&self, old: &Self, vcpu: &mut dyn Vcpu) -> Result<(), EngineError> {
        if self.system != old.system {
            vcpu.set_system_registers(&self.system)?;
        }
        if self.general != old.general {
            vcpu.set_registers(&self.general)?;
        }
        Ok(())
    }

    pub fn segments(&mut self) -> [(&'static str, &mut Segment); 8] {
        let system = &mut self.system;
        [
            ("cs", &mut system.cs),
            ("ds", &mut system.ds),
            ("es", &mut system.es),
            ("fs", &mut system.fs),
            ("gs", &mut system.gs),
            ("ss", &mut system.ss),
            ("tr", &mut system.tr),
            ("ldt", &mut system.ldt),
        ]
    }

    /// Calls `visit` with each register.
    fn walk(&mut self, visit: &mut dyn FnMut(&str, Field<'_>)) {
        for (name, field) in GPR.iter().zip(&mut self.general.gpr) {
            visit(name, Field::U64(field));
        }
        visit("rip", Field::U64(&mut self.general.rip));
        visit("rflags", Field::U64(&mut self.general.rflags));
        for (name, segment) in self.segments() {
            visit(&format!("{name}_selector"), Field::U16(&mut segment.selector));
            visit(&format!("{name}_base"), Field::U64(&mut segment.base));
            visit(&format!("{name}_limit"), Field::U32(&mut segment.limit));
            visit(&format!("{name}_attr"), Field::U32(&mut segment.attributes));
        }
        let system = &mut self.system;
        for (name, SegmentTable { base, limit }) in
            [("gdtr", &mut system.gdt), ("idtr", &mut system.idt)]
        {
            visit(&format!("{name}_base"), Field::U64(base));
            visit(&format!("{name}_limit"), Field::U16(limit));
        }
        for (name, field) in [
            ("cr0", &mut system.cr0),
            ("cr2", &mut system.cr2),
            ("cr3", &mut system.cr3),
            ("cr4", &mut system.cr4),
            ("cr8", &mut system.cr8),
            ("efer", &mut system.efer),
            ("apic_base", &mut system.apic_base),
        ] {
            visit(name, Field::U64(field));
        }
    }

    pub fn values(mut self) -> BTreeMap<String, u64> {
        let mut values = BTreeMap::new();
        self.walk(&mut |name, field| {
            values.insert(name.to_owned(), field.get());
        });
        values
    }

    /// Sets the registers named, or says which cannot be.
    pub fn set(&mut self, mut values: BTreeMap<String, u64>) -> Result<(), BadRegisters> {
        let mut problems = Vec::new();
        self.walk(&mut |name, mut field| {
            if let Some(value) = values.remove(name)
                && !field.set(value)
            {
                problems.push(BadRegister::TooLarge { name: name.to_owned(), value });
            }
        });
        problems.extend(values.into_keys().map(BadRegister::Unknown));
        if problems.is_empty() { Ok(()) } else { Err(BadRegisters(problems)) }
    }
}
