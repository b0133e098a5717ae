//! What is wrong with a host file, and where.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};

/// One thing that is wrong with a host file, or worth a warning.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Problem {
    /// The line in the file, from 1 on; none where it is about what the file does not say.
    pub line: Option<usize>,
    /// What, and what to do about it.
    pub what: String,
}

impl Problem {
    /// As `host.toml:12: what`, for the host file at `path`.
    #[must_use]
    pub fn at(&self, path: &Path) -> String {
        match self.line {
            Some(line) => format!("{}:{line}: {}", path.display(), self.what),
            None => format!("{}: {}", path.display(), self.what),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum HostFileError {
    /// Somebody named a file that is not there.
    #[error("{0}: there is no such host file; `pageferry config init` writes one")]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("{path}: the host file cannot be read: {error}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },
    /// What it says cannot be, each problem on a line of its own, as `host.toml:12: what`.
    #[error("{}", Listed(path, problems))]
    Bad {
        /// Which file.
        path: PathBuf,
        /// Everything that is wrong with it, in the order of its lines.
        problems: Vec<Problem>,
    },
}

impl HostFileError {
    /// What is wrong with it, problem by problem.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        match self {
            Self::Bad { problems, .. } => problems.clone(),
            Self::Missing(_) => {
                let what = "there is no such host file; `pageferry config init` writes one".to_owned();
                vec![Problem { line: None, what }]
            }
            Self::Read { error, .. } => {
                vec![Problem { line: None, what: format!("the host file cannot be read: {error}") }]
            }
        }
    }
}

struct Listed<'a>(&'a Path, &'a [Problem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.1.iter().enumerate() {
            if number > 0 {
                f.write_char('\n')?;
            }
            f.write_str(&problem.at(self.0))?;
        }
        Ok(())
    }
}
