//! Writing a disk as a stream: compressed grains in their order, each table behind its grains, the
//! directory and a footer at the end (VMware's "Virtual Disk Format 5.0", "Stream-Optimized
//! Compressed Sparse Extents").

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use miniz_oxide::deflate::compress_to_vec_zlib;

use super::descriptor;
use super::sparse::{DESCRIPTOR_AT, GRAIN, Header, MARKER_FOOTER, PER_TABLE};
use crate::backend::SECTOR;

const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;

/// Above it deflate takes more time for little.
const LEVEL: u8 = 4;
const THREADS_MAX: usize = 8;

pub(crate) struct Stream {
    file: BufWriter<File>,
    size: u64,
    /// Where the next thing goes.
    sector: u64,
    directory: Vec<u32>,
    /// Of the grains since the last table.
    table: Vec<u32>,
    /// The next grain.
    grain: u64,
}

impl Stream {
    pub fn create(file: File, path: &Path, size: u64) -> io::Result<Self> {
        let overhead = Header::of_stream(size, None).overhead;
        let mut first = vec![0; (overhead * SECTOR) as usize];
        first[..SECTOR as usize].copy_from_slice(&Header::of_stream(size, None).bytes());
        let text = descriptor::text("streamOptimized", path, size);
        first[(DESCRIPTOR_AT * SECTOR) as usize..][..text.len()].copy_from_slice(text.as_bytes());
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&first)?;
        let (directory, table) = (Vec::new(), Vec::new());
        Ok(Self { file, size, sector: overhead, directory, table, grain: 0 })
    }

    /// The next bytes of the disk: whole grains, but for the last.
    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        let grains: Vec<&[u8]> = data.chunks(GRAIN as usize).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let share = grains.len().div_ceil(threads).max(1);
        let packed: Vec<Option<Vec<u8>>> = std::thread::scope(|scope| {
            let pack = |part: &[&[u8]]| part.iter().map(|grain| packed(grain)).collect::<Vec<_>>();
            let work = |part| std::thread::Builder::new().spawn_scoped(scope, move || pack(part));
            let (first, rest) = grains.split_at(share.min(grains.len()));
            let workers: Vec<_> = rest.chunks(share).map(|part| (part, work(part))).collect();
            let mut done = pack(first);
            for (part, worker) in workers {
                // Where the host gives no thread, this one does its work.
                let theirs = worker.ok().and_then(|worker| worker.join().ok());
                done.extend(theirs.unwrap_or_else(|| pack(part)));
            }
            done
        });
        packed.into_iter().try_for_each(|grain| self.add(grain))
    }

    /// As many zeroes.
    pub fn skip(&mut self, length: u64) -> io::Result<()> {
        (0..length.div_ceil(GRAIN)).try_for_each(|_| self.add(None))
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.end_table()?;
        let bytes: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let sectors = (bytes.len() as u64).div_ceil(SECTOR);
        self.mark(sectors, MARKER_DIRECTORY)?;
        let directory = self.sector;
        self.put(&bytes)?;
        self.mark(1, MARKER_FOOTER)?;
        self.put(&Header::of_stream(self.size, Some(directory)).bytes())?;
        // The end of the stream is a marker of zeroes.
        self.mark(0, 0)?;
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_data()
    }

    fn add(&mut self, packed: Option<Vec<u8>>) -> io::Result<()> {
        let entry = match packed {
            None => 0,
            Some(data) => {
                let entry = self.here()?;
                let mut grain = (self.grain * (GRAIN / SECTOR)).to_le_bytes().to_vec();
                grain.extend((data.len() as u32).to_le_bytes());
                grain.extend(data);
                self.put(&grain)?;
                entry
            }
        };
        self.table.push(entry);
        self.grain += 1;
        if self.table.len() as u64 == PER_TABLE { self.end_table() } else { Ok(()) }
    }

    /// Writes the table of the last grains, if there are any.
    fn end_table(&mut self) -> io::Result<()> {
        let mut table = std::mem::take(&mut self.table);
        if table.is_empty() {
            return Ok(());
        }
        if table.iter().all(|&entry| entry == 0) {
            self.directory.push(0);
            return Ok(());
        }
        table.resize(PER_TABLE as usize, 0);
        let bytes: Vec<u8> = table.into_iter().flat_map(u32::to_le_bytes).collect();
        self.mark(bytes.len() as u64 / SECTOR, MARKER_TABLE)?;
        let entry = self.here()?;
        self.directory.push(entry);
        self.put(&bytes)
    }

    fn here(&self) -> io::Result<u32> {
        u32::try_from(self.sector).map_err(|_| io::ErrorKind::FileTooLarge.into())
    }

    /// A marker of what follows: its sectors, no size, its kind.
    fn mark(&mut self, sectors: u64, kind: u32) -> io::Result<()> {
        let mut marker = [0; SECTOR as usize];
        marker[..8].copy_from_slice(&sectors.to_le_bytes());
        marker[12..16].copy_from_slice(&kind.to_le_bytes());
        self.put(&marker)
    }

    /// Writes up to a whole sector.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sectors = (bytes.len() as u64).div_ceil(SECTOR);
        self.file.write_all(bytes)?;
        self.file.write_all(&[0; SECTOR as usize][..(sectors * SECTOR) as usize - bytes.len()])?;
        self.sector += sectors;
        Ok(())
    }
}

fn packed(grain: &[u8]) -> Option<Vec<u8>> {
    let zero = grain.iter().all(|&byte| byte == 0);
    (!zero).then(|| compress_to_vec_zlib(grain, LEVEL))
}
