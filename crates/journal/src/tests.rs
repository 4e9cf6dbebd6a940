use std::fs::File;
use std::io::{Read, Seek, Write};

use super::*;

fn file() -> File {
    // O_TMPFILE, so that nothing is left behind.
    use std::os::unix::fs::OpenOptionsExt;
    const O_TMPFILE: i32 = 0o20200000;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(O_TMPFILE)
        .open(std::env::temp_dir())
        .unwrap()
}

fn entries() -> Vec<Entry> {
    let outside = Outside {
        writes: vec![(0x1000, Bytes::from(vec![7; 5000]))],
        holes: vec![(0x9000, 4096)],
        lines: vec![Line::Pin { gsi: 4, level: true }, Line::Message { address: 1, data: 2 }],
        now_ns: 99,
    };
    (0..40)
        .flat_map(|round| {
            let stop = Stop {
                count: round,
                outside: outside.clone(),
                timers: Some((1, u64::MAX)),
                checkpoint: None,
            };
            [
                Entry::Memory(
                    round << 12,
                    Bytes::from((0..=255).cycle().take(30_000).collect::<Vec<u8>>()),
                ),
                Entry::Input(Input::Value(round)),
                Entry::Input(Input::Answer(Answer::Value(3))),
                Entry::Stop(stop),
            ]
        })
        .collect()
}

fn recording() -> Vec<u8> {
    let mut file = file();
    let mut writer = Writer::new(file.try_clone().unwrap(), "{\"memory\": 1}").unwrap();
    for (count, entry) in (0..).zip(entries()) {
        writer.put(count, &entry).unwrap();
    }
    writer.flush(500).unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn open(bytes: &[u8]) -> Result<Reader, JournalError> {
    let mut file = file();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    Reader::new(file)
}

fn all(reader: &mut Reader) -> Vec<Entry> {
    std::iter::from_fn(|| reader.read().unwrap()).collect()
}

#[test]
fn what_was_written_is_read() {
    let mut reader = open(&recording()).unwrap();
    assert_eq!(reader.configuration, "{\"memory\": 1}");
    assert_eq!((reader.last_count(), reader.cut), (500, false));
    assert_eq!(all(&mut reader), entries());
}

#[test]
fn a_reader_goes_back() {
    let mut reader = open(&recording()).unwrap();
    for _ in 0..50 {
        reader.read().unwrap();
    }
    let place = reader.place();
    let rest = all(&mut reader);
    reader.go(place);
    assert_eq!(all(&mut reader), rest);
    assert_eq!(rest.len(), entries().len() - 50);
}

/// Wherever the recorder dies, what it had finished is a recording.
#[test]
fn a_cut_recording_ends_with_its_last_whole_chunk() {
    let bytes = recording();
    let whole = entries();
    let mut most = 0;
    for length in (40..bytes.len()).step_by(997) {
        let mut reader = open(&bytes[..length]).unwrap();
        let read = all(&mut reader);
        assert!(whole.starts_with(&read), "cut at {length}");
        assert!(reader.cut || read.len() < whole.len());
        most = most.max(read.len());
    }
    assert!(most > 0);
}

#[test]
fn a_damaged_recording_is_refused() {
    let bytes = recording();
    for at in (0..bytes.len()).step_by(499) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x10;
        let refused = open(&bad).err();
        let known = matches!(refused, Some(JournalError::Damaged(_) | JournalError::Foreign));
        assert!(known, "byte {at}: {refused:?}");
    }
    assert!(matches!(open(b"TETRASV\x01"), Err(JournalError::Foreign)));
    assert!(matches!(open(b""), Err(JournalError::Foreign)));
}
