//! TensorBoard event files: scalars and images of a run.
//!
//! A file is a sequence of TFRecords, each an `Event` of `tensorflow/core/util/event.proto` in protocol buffers:
//!
//! ```text
//! u64 length (little endian) | masked CRC-32C of the length | data | masked CRC-32C of the data
//! mask(crc) = rotate_right(crc, 15) + 0xa282ead8
//! ```
//!
//! The few messages that are needed are written by hand. A process that is killed may leave half a record at the end of
//! its file, so each session of a run has a file of its own, and says from which step on it replaces what was there.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// The event file of one session.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Starts a new file in `folder`. With `purge_from`, TensorBoard drops what older files say of that step and later.
    pub fn create(folder: &Path, purge_from: Option<usize>) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("making the folder {}", folder.display()))?;
        // TensorBoard reads a folder's files in the order of their names; a clock that went back must not mix them up
        let number = fs::read_dir(folder)?.filter_map(|entry| number_of(&entry.ok()?.path())).max();
        let number = (now() as u64).max(number.map_or(0, |number| number + 1));
        let path = folder.join(format!("events.out.tfevents.{number:010}.alignprop"));
        let open = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = open.with_context(|| format!("writing {}", path.display()))?;
        let mut events = Self { file, path };
        events.write(&Message::default().text(3, "brain.Event:2"), 0)?;
        if let Some(step) = purge_from {
            let start = Message::default().varint(1, 1); // SessionLog::START
            events.write(&Message::default().message(7, &start), step)?;
        }
        Ok(events)
    }

    /// Adds numbers of one step.
    pub fn scalars<'a>(&mut self, step: usize, values: impl Iterator<Item = (&'a str, f64)>) -> Result<()> {
        let summary = values.fold(Message::default(), |summary, (tag, value)| {
            summary.message(1, &Message::default().text(1, tag).float(2, value as f32))
        });
        self.write(&Message::default().message(5, &summary), step)
    }

    /// Adds a PNG file of `width` x `height` pixels.
    pub fn image(&mut self, step: usize, tag: &str, (width, height): (u32, u32), png: &[u8]) -> Result<()> {
        let image = Message::default()
            .varint(1, u64::from(height))
            .varint(2, u64::from(width))
            .varint(3, 3) // RGB
            .bytes(4, png);
        let summary = Message::default().message(1, &Message::default().text(1, tag).message(4, &image));
        self.write(&Message::default().message(5, &summary), step)
    }

    fn write(&mut self, what: &Message, step: usize) -> Result<()> {
        let event = Message::default().double(1, now()).varint(2, step as u64).append(what);
        // one write, so that a reader seldom sees half a record
        self.file.write_all(&record(&event.0)).with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The number in the name of an event file.
fn number_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("events.out.tfevents.")?.split('.').next()?.parse().ok()
}

/// One TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli), bits reflected.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc: u32, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// A protocol buffers message, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }
    fn key(self, field: u64, wire_type: u64) -> Self {
        self.raw(field << 3 | wire_type)
    }
    fn varint(self, field: u64, value: u64) -> Self {
        self.key(field, 0).raw(value)
    }
    fn double(self, field: u64, value: f64) -> Self {
        self.key(field, 1).append_bytes(&value.to_le_bytes())
    }
    fn float(self, field: u64, value: f32) -> Self {
        self.key(field, 5).append_bytes(&value.to_le_bytes())
    }
    fn bytes(self, field: u64, value: &[u8]) -> Self {
        self.key(field, 2).raw(value.len() as u64).append_bytes(value)
    }
    fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }
    fn message(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }
    /// The other message's fields, after these.
    fn append(self, other: &Message) -> Self {
        self.append_bytes(&other.0)
    }
    fn append_bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, B.4, and the check value of the catalogue of CRCs
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn numbers_are_written_in_groups_of_seven_bits() {
        assert_eq!(Message::default().varint(1, 150).0, [0x08, 0x96, 0x01]);
        assert_eq!(Message::default().text(2, "testing").0, b"\x12\x07testing");
        assert_eq!(Message::default().float(2, 1.0).0, [0x15, 0, 0, 0x80, 0x3f]);
    }

    /// The records of a file, each checksum checked.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], masked_crc(&bytes[..8]));
            let data = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], masked_crc(data));
            records.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        records
    }

    fn contains(record: &[u8], part: &[u8]) -> bool {
        record.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn sessions_have_files_of_their_own_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = EventFile::create(folder.path(), None).unwrap();
        first.scalars(3, [("loss", 0.5), ("lr", 1e-3)].into_iter()).unwrap();
        first.image(3, "samples", (2, 1), b"PNG").unwrap();
        let second = EventFile::create(folder.path(), Some(4)).unwrap();
        assert!(first.path < second.path);

        let found = records(&fs::read(&first.path).unwrap());
        assert_eq!(found.len(), 3);
        assert!(contains(&found[0], b"\x1a\x0dbrain.Event:2"));
        // step 3, and a summary of two values: tag and float
        assert!(contains(&found[1], &[0x10, 3, 0x2a]));
        assert!(contains(&found[1], b"\x0a\x0b\x0a\x04loss\x15\x00\x00\x00\x3f"));
        assert!(contains(&found[1], b"\x0a\x02lr"));
        // height 1, width 2, three channels, the file
        assert!(contains(&found[2], b"\x22\x0b\x08\x01\x10\x02\x18\x03\x22\x03PNG"));

        let found = records(&fs::read(&second.path).unwrap());
        // a session that starts at step 4
        assert!(contains(&found[1], &[0x10, 4, 0x3a, 2, 0x08, 1]));
    }
}
