//! What can go wrong with a request, and with an image.

use std::path::PathBuf;

use rustix::io::Errno;

/// Why a request failed. The guest sees an I/O error; the host's log sees this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    #[error("{length} bytes at {offset} of a disk of {size} bytes")]
    Beyond { offset: u64, length: u64, size: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("the host's file system is full")]
    NoSpace,
    #[error("the image's file has become shorter than its disk")]
    Truncated,
    #[error("an earlier flush failed, and what was written before it may be lost")]
    LostWrites,
    #[error("a raw disk may not begin like an image unless format=raw is given")]
    LooksLikeAnImage,
    #[error("the host: {0}")]
    Host(Errno),
}

impl BlockError {
    /// Whether the host failed what a disk could do; else it was no request for this disk.
    pub fn is_of_the_host(self) -> bool {
        match self {
            Self::NoSpace | Self::Truncated | Self::LostWrites | Self::Host(_) => true,
            Self::Beyond { .. } | Self::ReadOnly | Self::LooksLikeAnImage => false,
        }
    }
}

impl From<Errno> for BlockError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::NoSpace,
            errno => Self::Host(errno),
        }
    }
}

impl From<std::io::Error> for BlockError {
    fn from(error: std::io::Error) -> Self {
        Errno::from_io_error(&error).unwrap_or(Errno::IO).into()
    }
}

/// Why an image cannot be used: what happened to which file, and what helps.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}; {mend}", path.display())]
pub struct ImageError {
    pub path: PathBuf,
    pub cause: String,
    pub mend: String,
    #[source]
    pub source: Option<std::io::Error>,
}

impl ImageError {
    pub fn new(
        path: impl Into<PathBuf>,
        cause: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self { path: path.into(), cause: cause.into(), mend: mend.into(), source: None }
    }

    /// The host refused something: `what` was tried.
    pub fn host(path: impl Into<PathBuf>, what: &str, source: std::io::Error) -> Self {
        let mend = match Errno::from_io_error(&source) {
            Some(Errno::NOENT) => {
                "give the path of an image, or make one by 'tetrarch disk create'"
            }
            Some(Errno::ACCESS | Errno::PERM) => "give the user who runs this access to the file",
            Some(Errno::ROFS) => "add readonly, or copy the image to where it can be written",
            Some(Errno::NOTDIR | Errno::NAMETOOLONG) => "give the path of an image",
            Some(Errno::FBIG) => "give a smaller size: the file system has no files so large",
            Some(Errno::ISDIR) => "give the path of an image, not of a directory",
            Some(Errno::NOSPC | Errno::DQUOT) => "make room on the host's file system",
            Some(Errno::MFILE | Errno::NFILE) => "raise the limit of open files: ulimit -n",
            Some(Errno::LOOP) => "mend the loop of symbolic links",
            None => "look for damage: tetrarch disk check IMAGE",
            _ => "look at the host's kernel log, and at the file system that it is on",
        };
        let cause = format!("{what}: {}", reason(&source));
        Self { path: path.into(), cause, mend: mend.into(), source: Some(source) }
    }
}

/// The host's words without Rust's "(os error 2)".
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}
