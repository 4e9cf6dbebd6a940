//! Tiles as ZRLE has them, before zlib (RFC 6143, 7.7.6).

use crate::{Part, PixelFormat};

/// The side of a tile, in points.
pub const TILE: usize = 64;

/// Colours that an index of 7 bits can name,
const COLOURS_MAX: usize = 127;
/// and those of one that is packed.
const PACKED_MAX: usize = 16;

const RAW: u8 = 0;
const RUNS: u8 = 128;

impl PixelFormat {
    /// All tiles of a part, each in the shortest of the forms.
    pub fn tiles(&self, part: &Part<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        let mut values = Vec::with_capacity(TILE * TILE);
        for tile in part.tiles(TILE) {
            values.clear();
            values.extend(tile.points().map(|point| self.value(point)));
            self.tile(&values, tile.w, &mut out);
        }
        out
    }

    fn tile(&self, values: &[u32], width: usize, out: &mut Vec<u8>) {
        let runs: Vec<_> = values.chunk_by(|one, next| one == next).collect();
        let point = self.compressed_len();
        let lengths = || runs.iter().map(|run| run_bytes(run.len()));
        let palette = Palette::of(runs.iter().map(|run| run[0]));
        let mut best = (values.len() * point, Form::Raw);
        let mut offer = |bytes: usize, form: Form| {
            if bytes < best.0 {
                best = (bytes, form);
            }
        };
        offer(lengths().sum::<usize>() + runs.len() * point, Form::Runs);
        if let Some(palette) = &palette {
            let colours = palette.0.len() * point;
            // A run of one point has no length.
            let indexed =
                runs.iter().map(|run| if run.len() == 1 { 1 } else { 1 + run_bytes(run.len()) });
            offer(colours + indexed.sum::<usize>(), Form::IndexedRuns);
            if palette.0.len() <= PACKED_MAX {
                let bits = packed_bits(palette.0.len());
                let line = (width * bits).div_ceil(8);
                offer(colours + line * (values.len() / width), Form::Packed);
            }
        }
        match (best.1, palette) {
            (Form::Packed, Some(palette)) => {
                out.push(palette.0.len() as u8);
                palette.0.iter().for_each(|&colour| self.push_compressed(colour, out));
                for line in values.chunks(width) {
                    pack(line, &palette, out);
                }
            }
            (Form::IndexedRuns, Some(palette)) if palette.0.len() > 1 => {
                out.push(RUNS | palette.0.len() as u8);
                palette.0.iter().for_each(|&colour| self.push_compressed(colour, out));
                for run in runs {
                    let index = palette.index(run[0]);
                    if run.len() == 1 {
                        out.push(index);
                    } else {
                        out.push(0x80 | index);
                        push_run(run.len(), out);
                    }
                }
            }
            (Form::Raw, _) => {
                out.push(RAW);
                values.iter().for_each(|&value| self.push_compressed(value, out));
            }
            (Form::Runs | Form::IndexedRuns | Form::Packed, _) => {
                out.push(RUNS);
                for run in runs {
                    self.push_compressed(run[0], out);
                    push_run(run.len(), out);
                }
            }
        }
    }
}

enum Form {
    Raw,
    /// With one colour nothing of it but that is sent.
    Packed,
    Runs,
    IndexedRuns,
}

/// Colours of a tile, in the order in which they are met first.
struct Palette(Vec<u32>);

impl Palette {
    fn of(colours: impl Iterator<Item = u32>) -> Option<Self> {
        let mut found: Vec<u32> = Vec::new();
        let mut last = None;
        for colour in colours {
            // Near the last one is where most of them are.
            if last == Some(colour) || found.iter().rev().any(|&other| other == colour) {
                continue;
            }
            if found.len() == COLOURS_MAX {
                return None;
            }
            found.push(colour);
            last = Some(colour);
        }
        Some(Self(found))
    }

    fn index(&self, colour: u32) -> u8 {
        self.0.iter().position(|&other| other == colour).unwrap_or(0) as u8
    }
}

fn packed_bits(colours: usize) -> usize {
    match colours {
        0 | 1 => 0,
        2 => 1,
        3 | 4 => 2,
        _ => 4,
    }
}

/// Lines begin on a byte, the leftmost point in its high bits.
fn pack(line: &[u32], palette: &Palette, out: &mut Vec<u8>) {
    let bits = packed_bits(palette.0.len());
    if bits == 0 {
        return;
    }
    for points in line.chunks(8 / bits) {
        let byte = points.iter().enumerate().fold(0, |byte, (place, &colour)| {
            byte | palette.index(colour) << (8 - bits * (place + 1))
        });
        out.push(byte);
    }
}

fn run_bytes(length: usize) -> usize {
    (length - 1) / 255 + 1
}

/// One less than its length, as bytes whose sum it is, the last of which is not 255.
fn push_run(length: usize, out: &mut Vec<u8>) {
    let left = length - 1;
    out.extend(std::iter::repeat_n(255, left / 255));
    out.push((left % 255) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Channel, POINT};

    fn format() -> PixelFormat {
        let rgb = [16, 8, 0].map(|shift| Channel { max: 255, shift });
        PixelFormat::new(32, false, rgb).unwrap()
    }

    /// A reader of its own: the points of a frame that has the size of the part.
    fn read(mut data: &[u8], width: usize, height: usize) -> Vec<[u8; 3]> {
        fn take<'a>(data: &mut &'a [u8], count: usize) -> &'a [u8] {
            let (taken, rest) = data.split_at(count);
            *data = rest;
            taken
        }
        let point = |data: &mut &[u8]| <[u8; 3]>::try_from(take(data, 3)).unwrap();
        let length = |data: &mut &[u8]| {
            let mut length = 1;
            loop {
                let byte = take(data, 1)[0];
                length += usize::from(byte);
                if byte != 255 {
                    return length;
                }
            }
        };
        let mut frame = vec![[0; 3]; width * height];
        for down in (0..height).step_by(TILE) {
            for across in (0..width).step_by(TILE) {
                let (w, h) = (TILE.min(width - across), TILE.min(height - down));
                let mut tile = Vec::new();
                match take(&mut data, 1)[0] {
                    0 => tile.extend((0..w * h).map(|_| point(&mut data))),
                    1 => tile = vec![point(&mut data); w * h],
                    colours @ 2..=16 => {
                        let palette: Vec<_> = (0..colours).map(|_| point(&mut data)).collect();
                        let bits = if colours == 2 {
                            1
                        } else if colours <= 4 {
                            2
                        } else {
                            4
                        };
                        for _ in 0..h {
                            let line = take(&mut data, (w * bits).div_ceil(8));
                            tile.extend((0..w).map(|at| {
                                let shift = 8 - bits - at * bits % 8;
                                let index = line[at * bits / 8] >> shift & ((1 << bits) - 1);
                                palette[usize::from(index)]
                            }));
                        }
                    }
                    128 => {
                        while tile.len() < w * h {
                            let colour = point(&mut data);
                            let count = length(&mut data);
                            tile.extend(std::iter::repeat_n(colour, count));
                        }
                    }
                    form @ 130.. => {
                        let palette: Vec<_> = (0..form - 128).map(|_| point(&mut data)).collect();
                        while tile.len() < w * h {
                            let index = take(&mut data, 1)[0];
                            let count = if index < 128 { 1 } else { length(&mut data) };
                            let colour = palette[usize::from(index & 127)];
                            tile.extend(std::iter::repeat_n(colour, count));
                        }
                    }
                    form => panic!("a tile of form {form}"),
                }
                assert_eq!(tile.len(), w * h);
                for (line, points) in tile.chunks(w).enumerate() {
                    let start = (down + line) * width + across;
                    frame[start..start + w].copy_from_slice(points);
                }
            }
        }
        assert!(data.is_empty());
        frame
    }

    fn check(width: usize, height: usize, colour: impl Fn(usize) -> u32) -> usize {
        let frame: Vec<u8> = (0..width * height).flat_map(|at| colour(at).to_le_bytes()).collect();
        let part = Part::new(&frame, width, [0, 0, width, height]).unwrap();
        let sent = format().tiles(&part);
        let want: Vec<[u8; 3]> =
            frame.chunks(POINT).map(|point| point[..3].try_into().unwrap()).collect();
        assert_eq!(read(&sent, width, height), want);
        sent.len()
    }

    #[test]
    fn each_form_is_read_again() {
        let noise = |at: usize| (at as u32).wrapping_mul(2_654_435_761) >> 8;
        for (width, height) in [(64, 64), (1, 1), (65, 3), (130, 70), (7, 65)] {
            assert!(check(width, height, |_| 5) <= 4 * 3 * 2);
            for colours in [2, 3, 4, 5, 16, 17, 100, 127, 128, 300] {
                check(width, height, |at| noise(at) % colours);
                check(width, height, |at| (at / 40) as u32 % colours);
            }
            check(width, height, noise);
            check(width, height, |at| (at / 1000) as u32);
            check(width, height, |at| if at < 2000 { 0 } else { noise(at) });
        }
    }

    #[test]
    fn short_forms_are_taken() {
        assert_eq!(check(64, 64, |_| 7), 4);
        assert_eq!(check(64, 64, |at| (at % 2) as u32), 1 + 2 * 3 + 64 * 8);
        assert!(check(64, 64, |at| (at / 64) as u32) < 64 * 6);
    }
}
