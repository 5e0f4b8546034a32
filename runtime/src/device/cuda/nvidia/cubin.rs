//! Whether a file is a whole cubin.
//!
//! The driver is given no length: it believes the file's own headers. A cubin is a 64-bit ELF file.

/// Size of an entry of the section table.
const SECTION_BYTES: usize = 64;
/// Type of a section that has no bytes in the file.
const NO_BITS: u32 = 8;

/// Checks that all sections and the table of segments lie inside the file.
///
/// # Errors
/// What was found.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let cut = || format!("the file of {} bytes is cut off", bytes.len());
    if bytes.get(..5) != Some(&[0x7f, b'E', b'L', b'F', 2]) {
        return Err("the file is no cubin".to_owned());
    }
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(field(bytes, at)?)));
    let long = |at: usize| usize::try_from(u64::from_le_bytes(field(bytes, at)?)).ok();
    let table = |start, entries| Some((long(start)?, half(entries)?, half(entries + 2)?));
    let (segments, entry_bytes, entries) = table(0x20, 0x36).ok_or_else(cut)?;
    if entries > 0 && segments.saturating_add(entries * entry_bytes) > bytes.len() {
        return Err(cut());
    }
    let (sections, entry_bytes, entries) = table(0x28, 0x3a).ok_or_else(cut)?;
    if entry_bytes != SECTION_BYTES {
        return Err(format!("its sections have entries of {entry_bytes} bytes"));
    }
    for index in 0..entries {
        let section = sections.saturating_add(index * SECTION_BYTES);
        let kind = u32::from_le_bytes(field(bytes, section.saturating_add(4)).ok_or_else(cut)?);
        let start = long(section.saturating_add(0x18)).ok_or_else(cut)?;
        let size = long(section.saturating_add(0x20)).ok_or_else(cut)?;
        if kind != NO_BITS && start.saturating_add(size) > bytes.len() {
            return Err(cut());
        }
    }
    Ok(())
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header, 16 bytes of code, and the table of an empty section and of the code's.
    fn cubin() -> Vec<u8> {
        let mut bytes = vec![0; 80 + 2 * SECTION_BYTES];
        bytes[..5].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2]);
        bytes[0x28] = 80;
        bytes[0x3a] = SECTION_BYTES as u8;
        bytes[0x3c] = 2;
        let code = 80 + SECTION_BYTES;
        bytes[code + 4] = 1;
        bytes[code + 0x18] = 64;
        bytes[code + 0x20] = 16;
        bytes
    }

    #[test]
    fn whole_files_pass() {
        assert_eq!(check(&cubin()), Ok(()));
        let mut zeroed = cubin();
        zeroed[80 + SECTION_BYTES + 4] = NO_BITS as u8;
        zeroed[80 + SECTION_BYTES + 0x22] = 255;
        assert_eq!(check(&zeroed), Ok(()));
    }

    #[test]
    fn others_do_not() {
        let whole = cubin();
        for len in 0..whole.len() - SECTION_BYTES {
            assert!(check(&whole[..len]).is_err(), "{len}");
        }
        assert!(check(b"// source").unwrap_err().contains("no cubin"));
        let mut long = cubin();
        long[80 + SECTION_BYTES + 0x21] = 9;
        assert!(check(&long).unwrap_err().contains("cut off"));
        let mut segments = cubin();
        segments[0x20] = 180;
        segments[0x36] = 56;
        segments[0x38] = 1;
        assert!(check(&segments).unwrap_err().contains("cut off"));
        let mut far = cubin();
        far[0x2f] = 255;
        assert!(check(&far).unwrap_err().contains("cut off"));
    }
}
