//! The counters of a machine, by group and name.

use std::collections::BTreeMap;

use crate::Machine;

pub type Stats = BTreeMap<String, BTreeMap<String, u64>>;

/// Sums over all vCPUs and, of a machine with several, each vCPU for itself.
/// All are live, but for the engine's of a vCPU whose device does not return: they are those
/// that it last told.
pub fn collect(machine: &Machine) -> Stats {
    let mut stats = Stats::new();
    let mut add = |group: &str, name: &str, value: u64| {
        let sum = stats.entry(group.to_owned()).or_default().entry(name.to_owned()).or_default();
        *sum = sum.saturating_add(value);
    };
    let many = machine.vcpus.len() > 1;
    let scale = |ticks| machine.scale.nanoseconds(ticks);
    for slot in &machine.vcpus {
        let counted = slot.control.counters.stats();
        let spent = [
            ("time_ns", "port_in", scale(counted.port_in_ticks)),
            ("time_ns", "port_out", scale(counted.port_out_ticks)),
            ("time_ns", "mmio_read", scale(counted.mmio_read_ticks)),
            ("time_ns", "mmio_write", scale(counted.mmio_write_ticks)),
        ];
        let loops = [
            ("exits", "port_in", counted.port_in),
            ("exits", "port_out", counted.port_out),
            ("exits", "mmio_read", counted.mmio_read),
            ("exits", "mmio_write", counted.mmio_write),
            ("exits", "halt", counted.halt),
            ("exits", "shutdown", counted.shutdown),
            ("exits", "kicked", counted.kicked),
            ("exits", "hypercall", counted.hypercall),
            ("exits", "msr_read", counted.msr_read),
            ("exits", "msr_write", counted.msr_write),
            ("exits", "port_with_registers", counted.port_with_registers),
            ("exits", "trap", counted.trap),
            ("exits", "debug", counted.debug),
            ("accesses", "unclaimed", counted.nobody),
            ("accesses", "rust", counted.native),
            ("accesses", "python", counted.python),
            ("time_ns", "run", scale(counted.run_ticks)),
            ("time_ns", "devices", scale(counted.native_ticks)),
            ("time_ns", "python", scale(counted.python_ticks)),
        ];
        for (group, name, value) in loops.into_iter().chain(spent).chain(slot.counters()) {
            add(group, name, value);
            if many {
                add(&format!("vcpu{}.{group}", slot.id), name, value);
            }
        }
    }
    stats
}
