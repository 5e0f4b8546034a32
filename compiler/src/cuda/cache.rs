//! Cubins that were compiled before, found by a hash of everything that they depend on.

use super::nvrtc::{Compiled, Nvrtc, OPTIONS, Source};
use std::{
    env,
    fmt::{self, Display},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// A directory of cubins, one file an entry. It is a convenience: a directory that cannot be read
/// or written costs time and nothing else.
///
/// An entry is a blake3 hash of what follows it, the log's length (u64, little-endian), the log, the
/// cubin.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: Option<PathBuf>,
}

/// Says what is compiled, by what, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(blake3::Hash);

impl Cache {
    /// The cache of this user: `KILN_CACHE`, or else `kiln/kernels` in `XDG_CACHE_HOME` or in
    /// `~/.cache`. `KILN_CACHE=off` does without one.
    pub fn from_env() -> Cache {
        let folder = |name| env::var_os(name).filter(|value| !value.is_empty());
        match folder("KILN_CACHE") {
            Some(off) if off == "off" => return Cache::off(),
            Some(dir) => return Cache::at(Path::new(&dir)),
            None => {}
        }
        let base = folder("XDG_CACHE_HOME")
            .map(PathBuf::from)
            // The standard has relative paths ignored.
            .filter(|path| path.is_absolute())
            .or_else(|| Some(Path::new(&folder("HOME")?).join(".cache")));
        Cache {
            dir: base.map(|base| base.join("kiln/kernels")),
        }
    }

    /// The cache in a directory, which is made when something is kept.
    pub fn at(dir: &Path) -> Cache {
        Cache {
            dir: Some(dir.to_owned()),
        }
    }

    /// Keeps nothing.
    pub fn off() -> Cache {
        Cache { dir: None }
    }

    /// What was kept for `key`. Nothing if it is damaged.
    pub fn get(&self, key: &Key) -> Option<Compiled> {
        decode(&fs::read(self.path(key)?).ok()?)
    }

    /// Keeps `compiled`, if that can be done. Whoever reads at the same time sees all or nothing.
    pub fn put(&self, key: &Key, compiled: &Compiled) {
        if let Some(path) = self.path(key) {
            // An unwritable cache is no cache.
            let _ = write(&path, compiled);
        }
    }

    fn path(&self, key: &Key) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.join(key.to_string()))
    }
}

impl Key {
    /// The key of compiling `source` for `arch` by `nvrtc`.
    pub fn new(nvrtc: &Nvrtc, source: &Source<'_>, arch: &str) -> Key {
        let mut hasher = blake3::Hasher::new();
        // With its length before it, no part can pass for the end of another.
        let mut add = |part: &str| {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        };
        add("kiln kernel 1");
        add(&nvrtc.identity());
        OPTIONS.iter().copied().for_each(&mut add);
        add(arch);
        add(source.name);
        add(source.text);
        for (name, text) in source.headers {
            add(name);
            add(text);
        }
        Key(hasher.finalize())
    }
}

impl Display for Key {
    /// The name of the entry's file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.to_hex())
    }
}

fn write(path: &Path, compiled: &Compiled) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&encode(compiled))?;
    file.persist(path)?;
    Ok(())
}

fn encode(compiled: &Compiled) -> Vec<u8> {
    let mut body = (compiled.log.len() as u64).to_le_bytes().to_vec();
    body.extend(compiled.log.as_bytes());
    body.extend(&compiled.cubin);
    let mut entry = blake3::hash(&body).as_bytes().to_vec();
    entry.extend(body);
    entry
}

fn decode(entry: &[u8]) -> Option<Compiled> {
    let (hash, body) = entry.split_first_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(body) != *hash {
        return None;
    }
    let (len, body) = body.split_first_chunk()?;
    let (log, cubin) = body.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    Some(Compiled {
        cubin: cubin.to_vec(),
        log: String::from_utf8(log.to_vec()).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled() -> Compiled {
        Compiled {
            cubin: vec![0x7f, b'E', b'L', b'F'],
            log: "Used 1 registers".to_owned(),
        }
    }

    #[test]
    fn an_entry_with_any_byte_changed_or_cut_off_is_no_entry() {
        let entry = encode(&compiled());
        assert_eq!(decode(&entry), Some(compiled()));
        for at in 0..entry.len() {
            assert_eq!(decode(&entry[..at]), None);
            let mut changed = entry.clone();
            changed[at] ^= 1;
            assert_eq!(decode(&changed), None);
        }
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let key = Key(blake3::hash(b"key"));
        for cache in [Cache::at(&file.path().join("below a file")), Cache::off()] {
            cache.put(&key, &compiled());
            assert_eq!(cache.get(&key), None);
        }
    }
}
