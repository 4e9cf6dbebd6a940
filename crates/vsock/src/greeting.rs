//! What a program of the host says before its bytes are the guest's.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

/// "CONNECT 4294967295\n" and room to spare.
const MAX_GREETING: usize = 32;

/// How far a greeting is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeted {
    /// The rest of it has not come yet.
    NotYet,
    /// A port of the guest.
    Port(u32),
    /// It is none, or the program has gone.
    Nothing,
}

/// As far as it has come.
#[derive(Default)]
pub struct Greeting(Vec<u8>);

impl Greeting {
    /// Reads which port the program wants: byte by byte, for what follows is the guest's.
    pub fn read(&mut self, mut stream: &UnixStream) -> Greeted {
        loop {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) if byte[0] != b'\n' && self.0.len() < MAX_GREETING => self.0.push(byte[0]),
                Ok(1) => {
                    let line = String::from_utf8_lossy(&self.0);
                    let port = line.trim().strip_prefix("CONNECT ").map(str::parse::<u32>);
                    return match port {
                        Some(Ok(port)) => Greeted::Port(port),
                        _ => Greeted::Nothing,
                    };
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Greeted::NotYet,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return Greeted::Nothing,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn greeting_comes_in_pieces_and_leaves_the_rest() {
        let (mut program, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut greeting = Greeting::default();
        assert_eq!(greeting.read(&stream), Greeted::NotYet);
        program.write_all(b"CONN").unwrap();
        assert_eq!(greeting.read(&stream), Greeted::NotYet);
        program.write_all(b"ECT 4294967295\nrest").unwrap();
        assert_eq!(greeting.read(&stream), Greeted::Port(u32::MAX));
        let mut rest = [0; 4];
        (&stream).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"rest");
    }

    #[test]
    fn what_is_no_greeting_is_nothing() {
        for said in ["HELLO 5\n", "CONNECT \n", "CONNECT 4294967296\n", &"x".repeat(100), ""] {
            let (mut program, stream) = UnixStream::pair().unwrap();
            stream.set_nonblocking(true).unwrap();
            program.write_all(said.as_bytes()).unwrap();
            drop(program);
            assert_eq!(Greeting::default().read(&stream), Greeted::Nothing, "{said}");
        }
    }
}
