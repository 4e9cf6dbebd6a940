//! The program in the guest that runs commands for the host.
//!
//! It listens on a vsock port; each connection is one command. It is put into guests as one
//! static program, so it has no library but libc. The protocol is in `protocol.rs`; the
//! other end is `tetrarch.agent`.
//!
//! As the guest's first program it is what is said in `init.rs`, and as `poweroff` and `reboot` it
//! asks that.

mod command;
mod init;
mod protocol;
mod vsock;

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::thread;

/// The port that the host connects to.
const PORT: u32 = 1024;

fn main() -> io::Result<()> {
    let path = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    match path.file_name().and_then(OsStr::to_str) {
        Some(name @ ("poweroff" | "reboot")) => return init::ask(name),
        _ if std::process::id() == 1 => return init::run(),
        _ => {}
    }
    // Who is gone at the other end is seen as an error of the write.
    // SAFETY: a plain call.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let listener = vsock::listen(PORT)?;
    loop {
        match vsock::accept(&listener) {
            Ok(stream) => {
                thread::spawn(move || {
                    // A connection that breaks ends its command, and nothing else.
                    let _ = command::serve(stream);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
