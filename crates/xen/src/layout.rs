//! Structures in guest memory, of 64-bit guests (Xen, xen/include/public/xen.h).

/// shared_info.
pub mod shared_info {
    pub const BYTES: usize = 4096;
    /// vcpu_info of vCPUs that have registered none, 64 bytes each.
    pub const VCPU_INFO: usize = 0;
    pub const LEGACY_VCPUS: usize = 32;
    /// A bit a port: an event is pending, or masked.
    pub const PENDING: usize = 2048;
    pub const MASK: usize = 2560;
    pub const WALL_CLOCK: usize = 3072;
    /// The upper half of the seconds, wc_sec_hi.
    pub const WALL_CLOCK_HIGH: usize = 3084;
}

/// vcpu_info.
pub mod vcpu_info {
    pub const BYTES: usize = 64;
    /// evtchn_upcall_pending, and in the byte behind it evtchn_upcall_mask.
    pub const UPCALL_PENDING: usize = 0;
    /// Words of pending ports, evtchn_pending_sel.
    pub const SELECTOR: usize = 8;
    /// vcpu_time_info.
    pub const TIME: usize = 32;
    pub const TIME_BYTES: usize = 32;
}
