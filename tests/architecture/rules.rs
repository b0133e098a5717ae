//! The rules themselves.

use std::fmt;

use crate::source::Source;

/// Where a rule is broken, and how.
pub(crate) struct Problem {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// The layers from the bottom up, and what each may use besides itself. This is the table of docs/architecture.md.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("layout", &["units"]),
    ("pageset", &["units", "layout"]),
    ("wire", &["units", "layout", "pageset"]),
    ("migration", &["units", "layout", "pageset", "wire"]),
    ("sys", &["units"]),
    ("memory", &["units", "layout", "pageset", "sys"]),
    ("dirty", &["units", "layout", "pageset", "sys", "memory"]),
    ("codec", &["units"]),
    ("channel", &["units", "layout", "pageset", "memory", "wire", "sys"]),
    ("session", &["units", "layout", "pageset", "memory", "wire", "codec", "channel"]),
    ("guest", &["units", "layout", "pageset", "sys", "memory", "dirty"]),
    ("engine", BELOW_ENGINE),
    ("host", BELOW_HOST),
    ("bin", &["host", "engine"]),
    // What tests need; its own use of the kernel goes through the fence like everybody's.
    ("testing", &["sys"]),
];

const BELOW_ENGINE: &[&str] = &[
    "units",
    "layout",
    "pageset",
    "wire",
    "migration",
    "sys",
    "memory",
    "dirty",
    "codec",
    "channel",
    "session",
    "guest",
];
/// The host names the things that it runs (guests, trackers, modes, limits) but neither bytes on the wire, nor channels,
/// nor the kernel.
const BELOW_HOST: &[&str] =
    &["engine", "units", "layout", "pageset", "migration", "memory", "dirty", "session", "guest"];

/// Modules without I/O, clocks or threads: the core that a simulation drives and that could be built for any target.
pub(crate) const CORE: [&str; 5] = ["units", "layout", "pageset", "wire", "migration"];
/// Dependencies that only compute.
pub(crate) const PURE: [&str; 6] = ["prost", "thiserror", "serde", "xxhash_rust", "hmac", "sha2"];
/// What of std reaches outside the program.
const IMPURE_STD: [&str; 7] = ["net", "fs", "io", "thread", "process", "env", "os"];

pub(crate) const MAX_LINES: usize = 500;

/// The names of the package's ordinary dependencies, as paths name them.
pub(crate) struct Dependencies(Vec<String>);

impl Dependencies {
    pub(crate) fn of(manifest: &str) -> Self {
        let (_, section) = manifest.split_once("\n[dependencies]").expect("Cargo.toml has dependencies");
        let section = section.split("\n[").next().unwrap_or(section);
        let names = section.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name.trim());
        let names: Vec<String> = names.map(|name| name.replace('-', "_")).collect();
        assert!(names.iter().any(|name| name == "rustix"), "the dependencies are read: {names:?}");
        Self(names)
    }
}

fn problem(source: &Source, line: usize, what: String) -> Problem {
    Problem { file: source.name.clone(), line, what }
}

/// A layer uses only layers below it, and none uses `testing`.
pub(crate) fn layers(source: &Source) -> Vec<Problem> {
    let own = source.layer();
    if own == "lib" {
        return Vec::new();
    }
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == own) else {
        return vec![problem(source, 1, format!("{own} is no layer that tests/architecture/rules.rs knows"))];
    };
    let uses = source.paths.iter().filter(|(path, _)| path[0] == "crate" || path[0] == "pageferry");
    uses.filter_map(|(path, line)| {
        let used = path.get(1)?.as_str();
        // A macro or an item at the crate's root is not a layer; there are none, and a glob would hide any.
        match LAYERS.iter().any(|(name, _)| *name == used) {
            _ if used == own || allowed.contains(&used) => None,
            _ if used == "testing" => Some(problem(source, *line, "testing is for tests only".to_owned())),
            true => Some(problem(source, *line, format!("{own} may not use {used}"))),
            false => Some(problem(source, *line, format!("{} names no layer", path.join("::")))),
        }
    })
    .collect()
}

/// `unsafe`, and the leave to write it, only inside the fence.
pub(crate) fn unsafe_code(source: &Source) -> Vec<Problem> {
    if source.layer() == "sys" {
        return Vec::new();
    }
    let words = source.words.iter().filter(|(word, _)| word == "unsafe" || word == "unsafe_code");
    words.map(|(word, line)| problem(source, *line, format!("{word} may stand only below src/sys"))).collect()
}

/// The core computes: it gets bytes, events and the time from its caller.
pub(crate) fn purity(source: &Source, dependencies: &Dependencies) -> Vec<Problem> {
    if !CORE.contains(&source.layer()) {
        return Vec::new();
    }
    let impure = |path: &[String]| match path[0].as_str() {
        "std" => {
            let second = path.get(1).map_or("*", String::as_str);
            let third = path.get(2).map(String::as_str);
            IMPURE_STD.contains(&second)
                || second == "*"
                || (second == "time" && third.is_none_or(|third| third != "Duration"))
        }
        other => dependencies.0.iter().any(|name| name == other) && !PURE.contains(&other),
    };
    let found = source.paths.iter().filter(|(path, _)| impure(path));
    found
        .map(|(path, line)| {
            problem(
                source,
                *line,
                format!("{} has no place in {}, which does no I/O", path.join("::"), source.layer()),
            )
        })
        .collect()
}

/// A file begins with what it is for, and ends before it is too long to be read at once.
pub(crate) fn shape(source: &Source) -> Vec<Problem> {
    let lines = source.text.lines().count();
    let mut problems = Vec::new();
    if lines > MAX_LINES {
        problems.push(problem(source, lines, format!("{lines} lines are more than {MAX_LINES}: split it")));
    }
    // `foo/tests.rs` is what its name says.
    if !source.text.starts_with("//! ") && !source.is_test() {
        problems.push(problem(source, 1, "a file begins with //! and what it is for".to_owned()));
    }
    problems
}
