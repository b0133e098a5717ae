//! Files that people are given: whole or not at all, and never over another one unless that is asked for.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Writes a file with these permissions. Without `replace` it must not be there yet; with it, the old one stays until the new
/// one is complete.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] without `replace`, and what the kernel says.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32, replace: bool) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?.to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let new = path.with_file_name(name);
    let written = fill(&new, bytes, mode).and_then(|()| {
        // A hard link, unlike a rename, fails when somebody has made the file meanwhile.
        if replace { fs::rename(&new, path) } else { fs::hard_link(&new, path) }
    });
    let _ = fs::remove_file(&new);
    written
}

fn fill(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_a_replacement_replaces_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        write(&path, b"one", 0o600, false).unwrap();
        assert_eq!(write(&path, b"two", 0o600, false).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        write(&path, b"three", 0o600, true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
