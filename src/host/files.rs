//! Files that are whole or absent, also after a crash: those that people are given, and those that a daemon keeps.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

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

/// Writes a value as JSON in place of what the file held before; durable when it returns.
///
/// # Errors
/// What the file system answers.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    write(path, &bytes, 0o600, true)?;
    sync_directory(path)
}

/// Removes a file durably; one that is not there is no error.
///
/// # Errors
/// What the file system answers.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => done?,
    }
    sync_directory(path)
}

/// Every value in a directory's `*.json`. One that cannot be read is left out with a line in the log: the others count.
///
/// # Errors
/// When the directory cannot be read.
pub(crate) fn read_all<T: DeserializeOwned>(directory: &Path) -> io::Result<Vec<T>> {
    let mut values = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let read = fs::read(&path).map_err(|error| error.to_string());
        match read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
            Ok(value) => values.push(value),
            Err(error) => tracing::error!("{} cannot be read and is left alone: {error}", path.display()),
        }
    }
    Ok(values)
}

/// Makes the names in a file's directory durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
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

    #[test]
    fn what_was_written_is_read_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        write_json(&path, &[1, 2]).unwrap();
        write_json(&path, &[3]).unwrap();
        fs::write(directory.path().join("torn.json"), b"[1,").unwrap();
        fs::write(directory.path().join("b.new"), b"[4]").unwrap();
        assert_eq!(read_all::<Vec<u8>>(directory.path()).unwrap(), [[3]]);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read_all::<Vec<u8>>(directory.path()).unwrap(), Vec::<Vec<u8>>::new());
    }
}
