//! Builds the core as a package of its own, with only the dependencies that compute: what it does not name cannot be used.
//!
//! Where the target wasm32-unknown-unknown is installed it is built for that, which has no files, sockets or clocks at
//! all; elsewhere for this machine, and the rule about paths stands for the rest.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::ROOT;
use crate::rules::{CORE, PURE};

const WASM: &str = "wasm32-unknown-unknown";

#[test]
fn the_core_builds_alone() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("core_alone");
    std::fs::create_dir_all(folder.join("src")).expect("the test's folder can be made");
    std::fs::write(folder.join("Cargo.toml"), manifest()).expect("the test's manifest can be written");
    std::fs::write(folder.join("src/lib.rs"), library()).expect("the test's library can be written");
    // The same versions as the package itself, which are on this machine already.
    std::fs::copy(Path::new(ROOT).join("Cargo.lock"), folder.join("Cargo.lock"))
        .expect("Cargo.lock can be copied");

    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["check", "--offline", "--quiet", "--target-dir"])
        .arg(folder.join("target"))
        .current_dir(&folder);
    if has_wasm() {
        println!("checking the core for {WASM}");
        cargo.args(["--target", WASM]);
    } else {
        println!(
            "checking the core for this machine, since {WASM} is not installed (rustup target add {WASM})"
        );
    }
    let output = cargo.output().expect("cargo starts");
    assert!(
        output.status.success(),
        "the core does not build alone:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Whether the standard library for wasm is there, asked of the compiler, which may not come from rustup.
fn has_wasm() -> bool {
    let output = Command::new("rustc").args(["--print", "target-libdir", "--target", WASM]).output();
    output.is_ok_and(|output| {
        output.status.success() && Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir()
    })
}

/// The pure dependencies, each in the words of the package's own manifest.
fn manifest() -> String {
    let ours = std::fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).expect("Cargo.toml can be read");
    let mut text = "[workspace]\n[package]\nname = \"core-alone\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\
                    [dependencies]\n"
        .to_owned();
    for line in ours.lines() {
        let name = line.split_once('=').map(|(name, _)| name.trim().replace('-', "_"));
        if name.is_some_and(|name| PURE.contains(&name.as_str())) {
            writeln!(text, "{line}").expect("a String takes everything");
        }
    }
    text
}

/// The core's modules where they stand.
fn library() -> String {
    let mut text = "//! The core alone.\n".to_owned();
    for module in CORE {
        let file = Path::new(ROOT).join("src").join(format!("{module}.rs"));
        let folder = Path::new(ROOT).join("src").join(module).join("mod.rs");
        let path = if file.exists() { file } else { folder };
        if path.exists() {
            writeln!(text, "#[path = {path:?}]\npub mod {module};").expect("a String takes everything");
        }
    }
    text
}
