//! Frames between host and guest: a byte that says what it is, four of its length
//! (little-endian), and the rest.
//!
//! The guest begins with HELLO and its VERSION. The host sends RUN, then INPUT (empty: the end),
//! WINDOW and SIGNAL; the guest sends OUTPUT, ERROR and at last EXIT.
//!
//! Input has flow control, since a command may read none and signals must pass it: the host has
//! no more than INPUT_WINDOW bytes on the way, and the guest tells by TAKEN how many more it took
//! off. SIGNALLED says that one more SIGNAL was delivered.

use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

pub const HELLO: u8 = b'H';
pub const RUN: u8 = b'R';
pub const INPUT: u8 = b'I';
pub const WINDOW: u8 = b'W';
pub const SIGNAL: u8 = b'S';
pub const OUTPUT: u8 = b'O';
pub const ERROR: u8 = b'E';
pub const EXIT: u8 = b'X';
pub const TAKEN: u8 = b'T';
pub const SIGNALLED: u8 = b'G';

/// Agents live on disks for years: a host that speaks another protocol can tell.
pub const VERSION: u32 = 1;

/// Input that may be on its way to the command.
pub const INPUT_WINDOW: usize = 256 << 10;

/// No frame is longer.
const LONGEST: u32 = 1 << 20;

pub fn read_frame(stream: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    if length > LONGEST {
        return Err(bad("a frame that is too long"));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    Ok((head[0], body))
}

/// In one write, so that threads may share the stream under a lock.
pub fn write_frame(stream: &mut impl Write, kind: u8, body: &[u8]) -> io::Result<()> {
    let mut frame = vec![kind];
    frame.extend((body.len() as u32).to_le_bytes());
    frame.extend(body);
    stream.write_all(&frame)
}

pub fn bad(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// A terminal's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub rows: u16,
    pub columns: u16,
}

impl Window {
    pub fn decode(body: &[u8]) -> io::Result<Self> {
        let word = |at: usize| Some(u16::from_le_bytes([*body.get(at)?, *body.get(at + 1)?]));
        match (word(0), word(2)) {
            (Some(rows), Some(columns)) => Ok(Self { rows, columns }),
            _ => Err(bad("a window that is cut short")),
        }
    }
}

/// What is to be run. Words of Linux are bytes of any kind, but zeroes.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// A terminal for it, of this size.
    pub terminal: Option<Window>,
    /// Where; empty: at home.
    pub directory: OsString,
    pub arguments: Vec<OsString>,
    /// "NAME=value"
    pub environment: Vec<OsString>,
}

impl Run {
    /// Flag of a terminal, window, then three lists of strings, each with its count and each
    /// string with its length.
    pub fn decode(body: &[u8]) -> io::Result<Self> {
        let (&terminal, rest) = body.split_first().ok_or_else(|| bad("an empty command"))?;
        let window = Window::decode(rest)?;
        let mut rest = &rest[4..];
        let mut lists = Vec::new();
        for _ in 0..3 {
            let count = number(&mut rest)?;
            let mut list = Vec::new();
            for _ in 0..count {
                let length = number(&mut rest)? as usize;
                let text = rest.get(..length).ok_or_else(|| bad("a command cut short"))?;
                rest = &rest[length..];
                list.push(OsString::from_vec(text.to_vec()));
            }
            lists.push(list);
        }
        let environment = lists.pop().unwrap_or_default();
        let arguments = lists.pop().unwrap_or_default();
        let directory = lists.pop().and_then(|mut list| list.pop()).unwrap_or_default();
        if arguments.is_empty() {
            return Err(bad("an empty command"));
        }
        let terminal = (terminal != 0).then_some(window);
        Ok(Self { terminal, directory, arguments, environment })
    }

    /// The environment as names and values.
    pub fn variables(&self) -> impl Iterator<Item = (&OsStr, &OsStr)> {
        self.environment.iter().filter_map(|entry| {
            let bytes = entry.as_bytes();
            let at = bytes.iter().position(|&byte| byte == b'=')?;
            Some((OsStr::from_bytes(&bytes[..at]), OsStr::from_bytes(&bytes[at + 1..])))
        })
    }
}

fn number(rest: &mut &[u8]) -> io::Result<u32> {
    let (word, tail) = rest.split_first_chunk().ok_or_else(|| bad("a command cut short"))?;
    *rest = tail;
    Ok(u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_is_read_and_one_cut_anywhere_is_refused() {
        let mut body = vec![1, 24, 0, 80, 0];
        let odd = &b"\xFF\xFE"[..];
        for list in [&[&b"/tmp"[..]][..], &[b"echo", odd], &[b"X=1=2", b"none"]] {
            body.extend((list.len() as u32).to_le_bytes());
            for text in list {
                body.extend((text.len() as u32).to_le_bytes());
                body.extend(*text);
            }
        }
        let run = Run::decode(&body).unwrap();
        assert_eq!(run.terminal, Some(Window { rows: 24, columns: 80 }));
        assert_eq!((run.directory.to_str(), run.arguments.len()), (Some("/tmp"), 2));
        assert_eq!(run.arguments[1].as_bytes(), odd);
        let variables: Vec<_> = run.variables().collect();
        assert_eq!(variables, [(OsStr::new("X"), OsStr::new("1=2"))]);
        for length in 0..body.len() {
            assert!(Run::decode(&body[..length]).is_err(), "{length}");
        }
        body[5..9].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Run::decode(&body).is_err());
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let mut wire = Vec::new();
        write_frame(&mut wire, OUTPUT, b"text").unwrap();
        assert_eq!(read_frame(&mut &wire[..]).unwrap(), (OUTPUT, b"text".to_vec()));
        assert!(read_frame(&mut &wire[..6]).is_err());
        assert!(read_frame(&mut &[INPUT, 0xFF, 0xFF, 0xFF, 0xFF][..]).is_err());
    }
}
