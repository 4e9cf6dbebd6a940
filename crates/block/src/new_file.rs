//! A file that has its name when it is whole: half an image, which one could take for a disk with
//! zeroes in it, is nowhere to be seen, also where the program is killed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD};

use crate::ImageError;
use crate::raw::take_lock;

/// A new file, locked as a writer's, until `finish`; else it is gone with this.
pub(crate) struct NewFile {
    /// `None` when it is finished.
    file: Option<File>,
    path: PathBuf,
    /// It has its name already, on a file system that has no files without one.
    named: bool,
}

impl NewFile {
    /// Refuses a path where anything is.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        if path.symlink_metadata().is_ok() {
            return Err(already(path));
        }
        let new = Self::nameless(path).or_else(|_| Self::named(path));
        let new = new.map_err(|error| refused(path, error))?;
        new.file.as_ref().map_or(Ok(()), |file| take_lock(file, path, true))?;
        Ok(new)
    }

    fn nameless(path: &Path) -> io::Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let file = options.open(folder.unwrap_or(Path::new(".")))?;
        Ok(Self { file: Some(file), path: path.to_owned(), named: false })
    }

    fn named(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Self { file: Some(file), path: path.to_owned(), named: true })
    }

    /// Another descriptor of the same open file.
    pub fn share(&self) -> io::Result<File> {
        self.file.as_ref().map_or(Err(io::ErrorKind::NotFound.into()), File::try_clone)
    }

    /// Gives the file its name.
    pub fn finish(mut self) -> Result<(), ImageError> {
        let Some(file) = self.file.take().filter(|_| !self.named) else { return Ok(()) };
        // linkat(2): who may not use AT_EMPTY_PATH may go by /proc.
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let linked = rustix::fs::linkat(CWD, own, CWD, &self.path, AtFlags::SYMLINK_FOLLOW);
        linked.map_err(|errno| refused(&self.path, errno.into()))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.named && self.file.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn already(path: &Path) -> ImageError {
    ImageError::new(path, "is there already", "give another path, or remove it first")
}

fn refused(path: &Path, error: io::Error) -> ImageError {
    match error.kind() {
        io::ErrorKind::AlreadyExists => already(path),
        io::ErrorKind::NotFound => {
            ImageError::new(path, "its folder is not there", "make that, or give another path")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ImageError {
            mend: "give a path in a folder that you can write to".into(),
            ..ImageError::host(path, "cannot make the image", error)
        },
        _ => ImageError::host(path, "cannot make the image", error),
    }
}

#[cfg(test)]
mod tests {
    use super::NewFile;

    #[test]
    fn file_has_its_name_when_it_is_finished_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        drop(NewFile::open(&path).unwrap());
        let names = || std::fs::read_dir(&folder).unwrap().count();
        assert_eq!(names(), 0);
        let (one, other) = (NewFile::open(&path).unwrap(), NewFile::open(&path).unwrap());
        assert_eq!(names(), 0);
        one.finish().unwrap();
        assert_eq!(names(), 1);
        // Who comes later takes nothing away.
        let refused = other.finish().unwrap_err().to_string();
        assert!(refused.contains("is there already; give another path"), "{refused}");
        assert!(NewFile::open(&path).is_err() && path.exists());
    }

    #[test]
    fn file_with_a_name_goes_unless_it_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = NewFile::named(&path).unwrap();
        assert!(path.exists());
        drop(file);
        assert!(!path.exists());
        NewFile::named(&path).unwrap().finish().unwrap();
        assert!(path.exists());
    }
}
