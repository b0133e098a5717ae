//! For tests: the machines' transitions as a table that is compared with the documented one.

use crate::layout::RamLayout;
use crate::units::RoundId;
use crate::wire::control::{Accept, Message, Setup, Token};
use std::fmt::Write as _;
use std::sync::LazyLock;

pub(super) const TOKEN: Token = Token([4; 16]);

/// One message of every kind.
pub(super) static MESSAGES: LazyLock<[Message; 11]> = LazyLock::new(|| {
    [
        Message::Setup(Setup {
            name: "guest".into(),
            guest: "model".into(),
            config: vec![],
            layout: RamLayout::flat(4096).expect("a page"),
            touched_pages: 1,
            mode: "tcp".into(),
            capabilities: vec![],
        }),
        Message::Accept(Accept { secret: [0; 32], capabilities: vec![] }),
        Message::RoundDone { round: RoundId(0), dirtied: 0 },
        Message::State(vec![]),
        Message::Finish { state_bytes: 0, stopped_at: 0 },
        Message::Ready(TOKEN),
        Message::Commit(TOKEN),
        Message::Running(TOKEN),
        Message::Query(TOKEN),
        Message::Fenced(TOKEN),
        Message::Abort("no".into()),
    ]
});

/// Compares `(waits for, what happens, what follows)` with `docs/transitions-<name>.md`; with `PAGEFERRY_BLESS` set, writes it.
///
/// # Panics
/// If they differ.
pub(super) fn check_table(name: &str, rows: &[(&str, &str, Vec<String>)]) {
    let mut table = format!(
        "# What the {name} does in every phase\n\nWritten by the tests of `src/migration/{name}.rs` (`PAGEFERRY_BLESS=1` \
         rewrites it) and compared by them. What is not named changes nothing.\n"
    );
    for phase in rows.chunk_by(|one, next| one.0 == next.0) {
        let _ =
            write!(table, "\n## Waiting for {}\n\n| what happens | what follows |\n|---|---|\n", phase[0].0);
        let mut by_follows: Vec<(&Vec<String>, Vec<&str>)> = Vec::new();
        for (_, happens, follows) in phase.iter().filter(|(_, _, follows)| !follows.is_empty()) {
            match by_follows.iter_mut().find(|(same, _)| *same == follows) {
                Some((_, all)) => all.push(happens),
                None => by_follows.push((follows, vec![happens])),
            }
        }
        for (follows, happens) in by_follows {
            let _ = writeln!(table, "| {} | {} |", happens.join(", "), follows.join(", "));
        }
    }
    let path = format!("{}/docs/transitions-{name}.md", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        std::fs::write(&path, &table).expect("docs can be written");
    }
    let documented = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(documented == table, "{path} is out of date; PAGEFERRY_BLESS=1 rewrites it:\n{table}");
}
