//! What a viewer of a machine's screen is sent, for every point of it: points in the viewer's own
//! format, as they are or in ZRLE's form (RFC 6143).
//!
//! A frame has 4 bytes for each point: blue, green, red, and one that says nothing. Knows no
//! machine, no socket and no Python.

#![forbid(unsafe_code)]

mod format;
mod password;
mod zrle;

pub use format::{Channel, FormatError, PixelFormat};
pub use password::answer;
pub use zrle::TILE;

/// Bytes of a point in a frame.
pub const POINT: usize = 4;

/// A part of a frame.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    frame: &'a [u8],
    width: usize,
    x: usize,
    y: usize,
    w: usize,
    h: usize,
}

impl<'a> Part<'a> {
    /// `None` where it does not lie within the frame, whose lines are `width` points long.
    pub fn new(frame: &'a [u8], width: usize, place: [usize; 4]) -> Option<Self> {
        let [x, y, w, h] = place;
        let across = x.checked_add(w)? <= width;
        let lines = y.checked_add(h)?;
        let down = lines.checked_mul(width)?.checked_mul(POINT)? <= frame.len();
        (across && down).then_some(Self { frame, width, x, y, w, h })
    }

    /// The points of one of its lines.
    fn line(&self, line: usize) -> &'a [[u8; POINT]] {
        let start = ((self.y + line) * self.width + self.x) * POINT;
        self.frame[start..start + self.w * POINT].as_chunks().0
    }

    fn points(&self) -> impl Iterator<Item = [u8; POINT]> {
        (0..self.h).flat_map(|line| self.line(line).iter().copied())
    }

    /// Its tiles, line by line.
    fn tiles(&self, side: usize) -> impl Iterator<Item = Self> {
        let whole = *self;
        (0..whole.h).step_by(side).flat_map(move |down| {
            (0..whole.w).step_by(side).map(move |across| Self {
                x: whole.x + across,
                y: whole.y + down,
                w: side.min(whole.w - across),
                h: side.min(whole.h - down),
                ..whole
            })
        })
    }
}
