//! Model-specific registers that are only stored; [`crate::cpu::msr`] says what may
//! be written to them.

use tetrarch_engine::machine_check::BANKS;

/// MTRRs of a base and a mask each.
pub const VARIABLE_MTRRS: usize = 8;
/// MISC_ENABLE: fast strings.
const MISC_ENABLE_FAST_STRING: u64 = 1;

#[derive(Clone)]
pub struct MsrFile {
    pub pat: u64,
    pub mtrr_default_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 2 * VARIABLE_MTRRS],
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// CTL, STATUS, ADDR, MISC of each bank.
    pub machine_check: [[u64; 4]; BANKS as usize],
    pub hwcr: u64,
    pub syscfg: u64,
    pub top_mem: u64,
    pub top_mem2: u64,
    pub ls_cfg: u64,
    pub debug_control: u64,
}

impl MsrFile {
    /// The values after RESET, but for the MTRRs: on (E), all write-back, as
    /// firmware leaves them. A kernel that is loaded without firmware needs
    /// that, since with MTRRs off Linux gives up PAT as well.
    pub fn new() -> Self {
        Self {
            // WB WT UC- UC, twice (SDM 3A, 12.12.4).
            pat: 0x0007_0406_0007_0406,
            mtrr_default_type: 1 << 11 | 6,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 2 * VARIABLE_MTRRS],
            misc_enable: MISC_ENABLE_FAST_STRING,
            spec_ctrl: 0,
            mcg_status: 0,
            // Errors of all kinds are told, as KVM has it.
            mcg_ctl: !0,
            machine_check: [[!0, 0, 0, 0]; BANKS as usize],
            hwcr: 0,
            syscfg: 0,
            top_mem: 0,
            top_mem2: 0,
            ls_cfg: 0,
            debug_control: 0,
        }
    }
}

impl Default for MsrFile {
    fn default() -> Self {
        Self::new()
    }
}
