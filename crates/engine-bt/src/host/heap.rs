//! The process's heap.

/// Has the allocator give what is free back to the host, where it does not do so by itself.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing that is allocated, and locks what it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}
