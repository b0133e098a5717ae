//! The rules of the design that a reviewer would have to look for, looked for on every run: which layer may use which,
//! where `unsafe` may stand, what the core may not touch, how long a file may be.
//!
//! Sources are read token by token, so comments and strings do not count and `use crate::{a, b}` does. Each rule has a
//! test of its own that shows it a bad sample, since a rule that cannot fail guards nothing.

mod core_alone;
mod rules;
mod source;

use std::path::Path;

use rules::{Dependencies, Problem};
use source::Source;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn every_source() -> Vec<Source> {
    let mut files = Vec::new();
    source::walk(&Path::new(ROOT).join("src"), &mut files);
    assert!(files.len() > 10, "src has more files than {}", files.len());
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).expect("a source file can be read");
        let name =
            path.strip_prefix(ROOT).expect("it lies below the root").to_str().expect("its name is UTF-8");
        Source::parse(name, &text)
    };
    let mut sources = files.iter().map(|path| read(path)).collect::<Vec<_>>();
    Source::exempt_test_modules(&mut sources);
    sources
}

fn dependencies() -> Dependencies {
    let manifest =
        std::fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).expect("Cargo.toml can be read");
    Dependencies::of(&manifest)
}

fn hold(rule: impl Fn(&Source) -> Vec<Problem>) {
    let problems: Vec<String> =
        every_source().iter().flat_map(rule).map(|problem| problem.to_string()).collect();
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn an_arrow_only_ever_points_down() {
    hold(rules::layers);
}

#[test]
fn unsafe_stands_only_in_sys() {
    hold(rules::unsafe_code);
}

#[test]
fn the_core_touches_neither_clock_nor_kernel() {
    let dependencies = dependencies();
    hold(|source| rules::purity(source, &dependencies));
}

#[test]
fn a_file_is_short_and_says_what_it_is() {
    hold(rules::shape);
}

/// What a rule says of a sample that stands in a file of that name.
fn complaints(name: &str, text: &str, rule: impl Fn(&Source) -> Vec<Problem>) -> Vec<String> {
    rule(&Source::parse(name, text)).iter().map(ToString::to_string).collect()
}

fn assert_complains(name: &str, text: &str, words: &str, rule: impl Fn(&Source) -> Vec<Problem>) {
    let said = complaints(name, text, rule);
    assert!(
        said.iter().any(|line| line.contains(words)),
        "{name} with {text:?} gave {said:?}, not {words:?}"
    );
}

#[test]
fn an_arrow_upwards_is_seen_however_it_is_written() {
    for text in [
        "use crate::engine::Engine;",
        "use crate::{units::Bytes, engine};",
        "use crate::{units::{Bytes, Run}, engine::{self, x}};",
        "fn f() { let _ = crate::engine::run(); }",
        "fn f() { println!(\"{}\", crate::engine::X) }",
        "use super::super::engine::Engine;",
        "mod inner { use super::super::super::engine::Engine; }",
        "#[cfg(not(test))] use crate::engine::Engine;",
        "#[cfg(test)] use crate::units::Run; use crate::engine::Engine;",
    ] {
        assert_complains("src/session/path.rs", text, "session may not use engine", rules::layers);
    }
    assert_complains("src/units.rs", "use crate::wire::X;", "units may not use wire", rules::layers);
    assert_complains("src/units.rs", "use super::wire::X;", "units may not use wire", rules::layers);
    assert_complains("src/wire/mod.rs", "use super::sys::X;", "wire may not use sys", rules::layers);
    assert_complains(
        "src/migration/mod.rs",
        "use crate::memory::X;",
        "migration may not use memory",
        rules::layers,
    );
    assert_complains("src/sys/mod.rs", "use crate::memory::X;", "sys may not use memory", rules::layers);
    assert_complains("src/engine/mod.rs", "use crate::host::X;", "engine may not use host", rules::layers);
    assert_complains("src/engine/mod.rs", "use crate::testing::X;", "testing is for tests", rules::layers);
    assert_complains("src/bin/pageferry.rs", "use pageferry::sys::X;", "bin may not use sys", rules::layers);
    assert_complains("src/engine/mod.rs", "use crate::*;", "names no layer", rules::layers);
    assert_complains("src/newcomer/mod.rs", "use crate::units::X;", "newcomer is no layer", rules::layers);
}

#[test]
fn an_arrow_downwards_and_what_tests_do_is_left_alone() {
    for text in [
        "use crate::channel::Channel; use super::path::Path; use self::path::Path;",
        "use crate::{units::{Bytes, Run}, wire};",
        "// crate::engine\n/* crate::engine */ /// crate::engine\nconst A: &str = \"crate::engine\";",
        "#[cfg(test)] mod tests { use crate::engine::Engine; }",
        "#[cfg(test)] use crate::engine::Engine;",
        "#[cfg(all(test, feature = \"kvm\"))] #[allow(x)] fn f() { crate::engine::run() }",
        "#![cfg(test)] use crate::engine::Engine;",
    ] {
        assert_eq!(complaints("src/session/path.rs", text, rules::layers), [""; 0], "{text}");
    }
    for name in ["src/session/tests.rs", "src/session/tests/pair.rs", "src/session/path/tests.rs"] {
        assert_eq!(complaints(name, "use crate::engine::Engine;", rules::layers), [""; 0]);
    }
}

#[test]
fn a_file_that_is_declared_for_tests_is_left_alone() {
    let declared = |declaration| {
        let parent = Source::parse("src/session/mod.rs", declaration);
        let child = Source::parse("src/session/pair.rs", "use crate::engine::Engine;");
        let mut sources = [parent, child];
        Source::exempt_test_modules(&mut sources);
        sources.iter().flat_map(rules::layers).count() == 0
    };
    assert!(
        declared("#[cfg(test)] mod pair;") && declared("#[cfg(test)] #[rustfmt::skip] pub(crate) mod pair;")
    );
    assert!(!declared("mod pair;") && !declared("#[cfg(test)] mod other;"));
}

#[test]
fn unsafe_outside_sys_is_seen() {
    for text in ["fn f() { unsafe { g() } }", "unsafe impl Send for X {}", "#![allow(unsafe_code)]"] {
        assert_complains("src/memory/mod.rs", text, "only below src/sys", rules::unsafe_code);
        assert_complains("src/memory/tests.rs", text, "only below src/sys", rules::unsafe_code);
        assert_eq!(complaints("src/sys/mapping.rs", text, rules::unsafe_code), [""; 0]);
    }
    let innocent = "/// unsafe\nfn f() { let _ = \"unsafe\"; }";
    assert_eq!(complaints("src/memory/mod.rs", innocent, rules::unsafe_code), [""; 0]);
}

#[test]
fn an_impure_core_is_seen() {
    let dependencies = dependencies();
    let rule = |source: &Source| rules::purity(source, &dependencies);
    for (text, words) in [
        ("use std::net::TcpStream;", "std::net"),
        ("use std::{fmt, fs};", "std::fs"),
        ("use std::io::{self, Read};", "std::io"),
        ("use std::time::{Duration, Instant};", "std::time::Instant"),
        ("fn f() { std::time::SystemTime::now(); }", "std::time::SystemTime"),
        ("use std::time::*;", "std::time::*"),
        ("fn f() { std::thread::sleep(d) }", "std::thread"),
        ("use ::std::process::Command;", "std::process"),
        ("use rustix::fs::open;", "rustix"),
        ("use crossbeam_channel::Sender;", "crossbeam_channel"),
        ("fn f() { libc::getpid(); }", "libc"),
    ] {
        for file in
            ["src/migration/source.rs", "src/wire/data.rs", "src/units.rs", "src/layout.rs", "src/pageset.rs"]
        {
            assert_complains(file, text, words, rule);
        }
        assert_eq!(complaints("src/session/path.rs", text, rule), [""; 0]);
    }
    let pure =
        "use std::time::Duration; use prost::Message; use std::fmt; #[cfg(test)] mod t { use std::fs; }";
    assert_eq!(complaints("src/wire/data.rs", pure, rule), [""; 0]);
}

#[test]
fn a_long_or_nameless_file_is_seen() {
    let long = format!("//! A file.\n{}", "\n".repeat(rules::MAX_LINES));
    assert_complains("src/units.rs", &long, "501 lines", rules::shape);
    assert_complains("src/units.rs", "use std::fmt;", "begins with //!", rules::shape);
    assert_eq!(complaints("src/units.rs", "//! Units.\n", rules::shape), [""; 0]);
}
