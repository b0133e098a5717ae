//! `pageferry config`: checks a host file, shows what holds and from where, writes a new one, prints its schema.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::show::shown;
use super::{DEFAULT_PATH, Problem, json_schema, kernel_name, load, value};
use crate::host::exit::Exit;
use crate::host::files;

/// Says whether the host file can be used, on stdout, and everything that is wrong with it or worth a warning, on stderr, as
/// `host.toml:12: what`. As JSON it is one object on stdout. A host file that cannot be used ends in [`Exit::Failed`].
#[must_use]
pub fn check(path: Option<&Path>, json: bool) -> Exit {
    let found = Checked::of(path);
    if json {
        say(&mut io::stdout(), &found.json());
    } else {
        say(&mut io::stderr(), &found.complaints());
        say(&mut io::stdout(), &found.verdict());
    }
    if found.problems.is_empty() { Exit::Completed } else { Exit::Failed }
}

/// Prints every key with its value and where that is from. A host file that cannot be used ends in [`Exit::Failed`].
#[must_use]
pub fn show(path: Option<&Path>, json: bool) -> Exit {
    match load(path) {
        Ok(loaded) => {
            let shown = shown(&loaded);
            say(&mut io::stdout(), &if json { shown.json() } else { shown.table() });
            Exit::Completed
        }
        Err(_) => check(path, json),
    }
}

/// Writes a host file with every key and its default, commented out. It replaces one only when forced to.
#[must_use]
pub fn init(path: Option<&Path>, force: bool) -> Exit {
    let path = path.unwrap_or(Path::new(DEFAULT_PATH));
    match write_template(path, force) {
        Ok(()) => {
            say(
                &mut io::stdout(),
                &format!(
                    "Wrote {}. All of it is commented out: what holds until it is changed.",
                    path.display()
                ),
            );
            Exit::Completed
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            say(
                &mut io::stderr(),
                &format!("{}: it is there already; --force writes over it", path.display()),
            );
            Exit::Failed
        }
        Err(error) => {
            say(&mut io::stderr(), &format!("{}: it cannot be written: {error}", path.display()));
            Exit::Failed
        }
    }
}

/// Prints the JSON schema of the host file.
#[must_use]
pub fn schema() -> Exit {
    say(&mut io::stdout(), &schema_text());
    Exit::Completed
}

pub(super) fn schema_text() -> String {
    // A schema is JSON by its type.
    serde_json::to_string_pretty(&json_schema()).unwrap_or_default()
}

/// What is printed may be cut short by whoever reads it; that is theirs to do.
fn say(to: &mut dyn Write, text: &str) {
    if !text.is_empty() {
        let _ = writeln!(to, "{text}");
    }
}

fn write_template(path: &Path, force: bool) -> io::Result<()> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::create_dir_all(directory)?;
    }
    files::write(path, template().as_bytes(), 0o644, force)
}

/// The text of a new host file, with this host's name.
pub(super) fn template() -> String {
    let kernel_name = kernel_name();
    let name = if value::check_host_name(&kernel_name).is_ok() { kernel_name.as_str() } else { "host-a" };
    include_str!("template.toml").replace("HOSTNAME", name)
}

/// What a check found.
pub(super) struct Checked {
    /// As it was named, or the default one if it is there.
    path: Option<PathBuf>,
    /// Who this host is, if that is known.
    name: Option<String>,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Problem>,
}

impl Checked {
    pub(super) fn of(path: Option<&Path>) -> Self {
        let loaded = match load(path) {
            Ok(loaded) => loaded,
            Err(error) => {
                let path = Some(path.unwrap_or(Path::new(DEFAULT_PATH)).to_owned());
                return Self { path, name: None, problems: error.problems(), warnings: Vec::new() };
            }
        };
        let mut warnings = loaded.warnings.clone();
        let problems = match loaded.identity() {
            Ok(identity) => {
                warnings.extend(identity.map(|identity| loaded.doubts(&identity)).unwrap_or_default());
                Vec::new()
            }
            Err(error) => error.problems(),
        };
        warnings.extend(loaded.exposure());
        warnings.sort();
        Self { path: loaded.path, name: Some(loaded.config.name), problems, warnings }
    }

    fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(DEFAULT_PATH))
    }

    pub(super) fn complaints(&self) -> String {
        let problems = self.problems.iter().map(|problem| problem.at(self.path()));
        let warning = |problem: &Problem| {
            let what = format!("warning: {}", problem.what);
            Problem { what, line: problem.line }.at(self.path())
        };
        let lines: Vec<String> = problems.chain(self.warnings.iter().map(warning)).collect();
        lines.join("\n")
    }

    pub(super) fn verdict(&self) -> String {
        match (&self.path, &self.name) {
            _ if !self.problems.is_empty() => String::new(),
            (Some(path), Some(name)) => format!("OK: {} (host {name})", path.display()),
            (_, name) => format!(
                "OK: there is no {DEFAULT_PATH}, so the defaults hold (host {})",
                name.as_deref().unwrap_or("without a name")
            ),
        }
    }

    pub(super) fn json(&self) -> String {
        json!({
            "path": self.path,
            "host": self.name,
            "ok": self.problems.is_empty(),
            "problems": self.problems,
            "warnings": self.warnings,
        })
        .to_string()
    }
}
