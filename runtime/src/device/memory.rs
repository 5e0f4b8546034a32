//! How much memory the machine has left.

/// Bytes that the system can give without swapping, where it tells (Linux: `MemAvailable`).
pub fn available_bytes() -> Option<u64> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_available_line() {
        let text = "MemTotal:       24689696 kB\nMemFree: 1 kB\nMemAvailable:   24000000 kB\n";
        assert_eq!(parse_meminfo(text), Some(24_000_000 * 1024));
        assert_eq!(parse_meminfo("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_meminfo("MemAvailable: much\n"), None);
    }
}
