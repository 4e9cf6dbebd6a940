//! The form of saved state: sections, each with name, version, length and CRC.
//!
//! ```text
//! u8   length of the name      name in UTF-8
//! u16  version                 u32  length of the body
//! u32  CRC-32 (IEEE 802.3) of all that precedes and of the body
//! body
//! ```
//!
//! Numbers are little-endian. The body is postcard's encoding of the state: a
//! documented, stable form that is read with checks of every length, and small.
//! It does not describe itself; that is what the version is for.

use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionError {
    #[error("the saved state ends too early")]
    Short,
    #[error("a section '{wanted}' was expected, not '{found}'")]
    Name { wanted: &'static str, found: String },
    #[error("the section '{name}' has version {found}, and this program reads version {known}")]
    Version { name: &'static str, found: u16, known: u16 },
    #[error("the section '{name}' is damaged: {what}")]
    Damaged { name: &'static str, what: String },
    #[error("the state '{name}' cannot be written: {what}")]
    Write { name: &'static str, what: String },
}

pub fn write<T: Serialize>(
    name: &'static str,
    version: u16,
    state: &T,
) -> Result<Vec<u8>, SectionError> {
    let failed = |what: String| SectionError::Write { name, what };
    let body = postcard::to_stdvec(state).map_err(|error| failed(error.to_string()))?;
    let length = u32::try_from(body.len()).map_err(|error| failed(error.to_string()))?;
    let mut data = vec![name.len() as u8];
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&version.to_le_bytes());
    data.extend_from_slice(&length.to_le_bytes());
    let crc = crc(&data, &body);
    data.extend_from_slice(&crc.to_le_bytes());
    data.extend_from_slice(&body);
    Ok(data)
}

fn crc(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}

/// Reads `data`, which is one section and no more.
pub fn read<T: for<'a> Deserialize<'a>>(
    name: &'static str,
    version: u16,
    data: &[u8],
) -> Result<T, SectionError> {
    let damaged = |what: &str| SectionError::Damaged { name, what: what.into() };
    let mut rest = data;
    let length = usize::from(take::<1>(&mut rest)?[0]);
    let (found, after) = rest.split_at_checked(length).ok_or(SectionError::Short)?;
    rest = after;
    let found_version = u16::from_le_bytes(take(&mut rest)?);
    let length = u32::from_le_bytes(take(&mut rest)?);
    let head = &data[..data.len() - rest.len()];
    let sum = u32::from_le_bytes(take(&mut rest)?);
    if found != name.as_bytes() {
        let found = String::from_utf8_lossy(found).escape_debug().to_string();
        return Err(SectionError::Name { wanted: name, found });
    }
    // Before the sum: a later version may have another form altogether.
    if found_version != version {
        return Err(SectionError::Version { name, found: found_version, known: version });
    }
    if rest.len() < length as usize {
        return Err(SectionError::Short);
    }
    if rest.len() > length as usize {
        return Err(damaged("there is more behind it"));
    }
    if crc(head, rest) != sum {
        return Err(damaged("its checksum is wrong"));
    }
    let (state, left) = postcard::take_from_bytes(rest)
        .map_err(|error| SectionError::Damaged { name, what: error.to_string() })?;
    if left.is_empty() { Ok(state) } else { Err(damaged("it is too long")) }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], SectionError> {
    let (bytes, after) = rest.split_first_chunk::<N>().ok_or(SectionError::Short)?;
    *rest = after;
    Ok(*bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATE: (u32, Vec<u8>) = (7, Vec::new());

    #[test]
    fn state_survives_and_every_damage_is_found() {
        let state = (7_u32, vec![1_u8, 2, 3]);
        let data = write("thing", 3, &state).unwrap();
        assert_eq!(read::<(u32, Vec<u8>)>("thing", 3, &data), Ok(state));
        for length in 0..data.len() {
            assert!(read::<(u32, Vec<u8>)>("thing", 3, &data[..length]).is_err(), "{length}");
        }
        for at in 0..data.len() {
            let mut bad = data.clone();
            bad[at] ^= 0x10;
            assert!(read::<(u32, Vec<u8>)>("thing", 3, &bad).is_err(), "byte {at}");
        }
        assert!(read::<(u32, Vec<u8>)>("thing", 3, &[&data[..], &[0]].concat()).is_err());
    }

    #[test]
    fn other_versions_and_names_are_refused_by_name() {
        let data = write("thing", 4, &STATE).unwrap();
        let error = read::<(u32, Vec<u8>)>("thing", 3, &data).unwrap_err();
        assert_eq!(error, SectionError::Version { name: "thing", found: 4, known: 3 });
        let error = read::<(u32, Vec<u8>)>("other", 4, &data).unwrap_err().to_string();
        assert!(error.contains("'other'") && error.contains("'thing'"), "{error}");
    }

    #[test]
    fn body_that_is_shorter_than_its_type_is_damaged() {
        let data = write("thing", 1, &7_u8).unwrap();
        let error = read::<(u8, u8)>("thing", 1, &data).unwrap_err();
        assert!(matches!(error, SectionError::Damaged { .. }), "{error}");
    }
}
