//! A file that appears when it is whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that is yet to be written.
///
/// The file next to it that it is written to is made at once, so that a path that cannot be written
/// is found out before the work and not after it.
#[derive(Debug)]
pub struct WholeFile {
    path: PathBuf,
    unfinished: PathBuf,
    file: File,
}

/// A file cannot be written: the path is wrong, or the disk is full.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct WholeFileError {
    /// Where it was to be.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl WholeFile {
    /// Makes sure that the file can be written.
    ///
    /// # Errors
    /// [`WholeFileError`].
    pub fn create(path: &Path) -> Result<WholeFile, WholeFileError> {
        let cannot = |source| WholeFileError {
            path: path.to_owned(),
            source,
        };
        let name = path.file_name().filter(|_| !path.is_dir());
        let name = name.ok_or_else(|| cannot(io::ErrorKind::IsADirectory.into()))?;
        let mut unfinished = name.to_owned();
        unfinished.push(format!(".{}.tmp", std::process::id()));
        let unfinished = path.with_file_name(unfinished);
        Ok(WholeFile {
            file: File::create(&unfinished).map_err(cannot)?,
            path: path.to_owned(),
            unfinished,
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`WholeFileError`], with what `write` gives among them; nothing is left behind then.
    pub fn finish(
        self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), WholeFileError> {
        let mut to = BufWriter::new(&self.file);
        let written = write(&mut to).and_then(|()| to.flush());
        let renamed = written.and_then(|()| fs::rename(&self.unfinished, &self.path));
        renamed.map_err(|source| WholeFileError {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        // Renamed by now, unless something went wrong, which has been reported.
        let _ = fs::remove_file(&self.unfinished);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let files = || fs::read_dir(dir.path()).unwrap().count();
        let path = dir.path().join("x.json");
        drop(WholeFile::create(&path).unwrap());
        assert_eq!(files(), 0);
        for text in ["one", "two"] {
            let file = WholeFile::create(&path).unwrap();
            file.finish(|to| to.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let failed = WholeFile::create(&path)
            .unwrap()
            .finish(|_| Err(io::ErrorKind::StorageFull.into()));
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(files(), 1);
        for wrong in [dir.path().join("none/x"), dir.path().to_owned()] {
            let error = WholeFile::create(&wrong).unwrap_err().to_string();
            let expected = format!("cannot write {}: ", wrong.display());
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn it_may_be_read_by_whoever_may_read_others() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let file = fs::metadata(dir.path().join(name)).unwrap();
            file.permissions().mode()
        };
        fs::write(dir.path().join("other"), "").unwrap();
        let file = WholeFile::create(&dir.path().join("whole")).unwrap();
        file.finish(|_| Ok(())).unwrap();
        assert_eq!(mode("whole"), mode("other"));
    }
}
