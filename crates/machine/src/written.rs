//! Which RAM was written since some moment, whoever takes the engine's log meanwhile.

use tetrarch_engine::DirtyPages;
use tetrarch_memory::{PAGE_SIZE, Range};

use crate::{Machine, MachineError};

impl Machine {
    /// Begins anew to note what is written.
    pub fn log_writes(&self) -> Result<(), MachineError> {
        let mut written = self.written.lock();
        if written.is_none() {
            self.engine.set_dirty_log(true)?;
        }
        self.engine.take_dirty_log()?;
        *written = Some(Vec::new());
        Ok(())
    }

    /// What was written since [`log_writes`](Self::log_writes), by ascending address; None: nobody
    /// has called that. It is not forgotten by this.
    pub fn written(&self) -> Result<Option<Vec<Range>>, MachineError> {
        let mut written = self.written.lock();
        let Some(so_far) = &mut *written else { return Ok(None) };
        for new in self.engine.take_dirty_log()? {
            let same = |old: &&mut DirtyPages| {
                old.start == new.start && old.bitmap.len() == new.bitmap.len()
            };
            match so_far.iter_mut().find(same) {
                Some(old) => {
                    old.bitmap.iter_mut().zip(&new.bitmap).for_each(|(old, new)| *old |= new);
                }
                None => so_far.push(new),
            }
        }
        let mut ranges: Vec<Range> = Vec::new();
        for region in self.memory.ram() {
            for pages in so_far.iter().filter(|pages| pages.start == region.start) {
                let end = region.start.0 + region.len;
                for page in pages.addresses().map(|page| page.0).take_while(|&page| page < end) {
                    match ranges.last_mut() {
                        Some(range) if range.end == page => range.end += PAGE_SIZE,
                        _ => ranges.push(page..page + PAGE_SIZE),
                    }
                }
            }
        }
        Ok(Some(ranges))
    }
}
