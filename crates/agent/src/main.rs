//! The program in the guest that runs commands for the host.
//!
//! It listens on a vsock port; each connection is one command. It is put into guests as one
//! static program, so it has no library but libc. The protocol is in `protocol.rs`; the
//! other end is `tetrarch.agent`.

mod command;
mod protocol;
mod vsock;

use std::io;
use std::thread;

/// The port that the host connects to.
const PORT: u32 = 1024;

fn main() -> io::Result<()> {
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
