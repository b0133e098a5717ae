//! `pageferry migrate`, `check`, and the ways to look at a migration.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use super::Out;
use crate::host::api::check::CheckReport;
use crate::host::api::client::{Client, ClientError, segment};
use crate::host::api::migration::{MigrateRequest, Migration, MigrationState};
use crate::host::daemon::routes::CheckAsked;
use crate::host::exit::Exit;
use crate::host::view::{self, Watch};

/// How often a migration is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long a daemon that does not answer is waited for: it may be starting anew.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn migrate(
    client: &Client,
    out: &Out,
    name: &str,
    request: &MigrateRequest,
    detach: bool,
) -> Result<Exit, ClientError> {
    let begun: Migration = client.post(&format!("/v1/guests/{}/migrate", segment(name)), request).await?;
    if detach {
        out.show(&begun, |begun| {
            format!("migration {} has begun; `pageferry status {0} --watch` shows it, `pageferry cancel {0}` ends it", begun.id)
        });
        return Ok(Exit::Completed);
    }
    until_over(client, out, begun).await
}

pub(super) async fn status(client: &Client, out: &Out, id: &str, watch: bool) -> Result<Exit, ClientError> {
    let migration: Migration = client.get(&format!("/v1/migrations/{}", segment(id))).await?;
    if watch {
        // How it ends decides how this ends, also when it is over already.
        return until_over(client, out, migration).await;
    }
    out.show(&migration, |migration| {
        if migration.state.is_over() { view::result_text(migration) } else { view::progress_line(migration) }
    });
    Ok(Exit::Completed)
}

/// Shows a migration until it is over or in doubt. It goes on by itself when nobody looks.
async fn until_over(client: &Client, out: &Out, begun: Migration) -> Result<Exit, ClientError> {
    let mut watch = Watch::on_stderr(out.json);
    let path = format!("/v1/migrations/{}", segment(&begun.id));
    let mut last = begun;
    let mut heard = Instant::now();
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    while !last.state.is_over() && last.state != MigrationState::InDoubt {
        watch.update(&last);
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = &mut interrupted => {
                watch.finish();
                eprintln!("pageferry: migration {0} goes on; `pageferry cancel {0}` ends it", last.id);
                return Ok(Exit::Failed);
            }
        }
        match client.get(&path).await {
            Ok(now) => (last, heard) = (now, Instant::now()),
            // Killed, perhaps, and started anew: the migration goes on without it.
            Err(error) if heard.elapsed() > PATIENCE => {
                watch.finish();
                return Err(error);
            }
            Err(_) => {}
        }
    }
    watch.finish();
    out.show(&last, view::result_text);
    Ok(exit(&last))
}

fn exit(migration: &Migration) -> Exit {
    match migration.state {
        MigrationState::Completed if migration.ram_equal == Some(false) => Exit::Damaged,
        MigrationState::Completed => Exit::Completed,
        MigrationState::RolledBack => Exit::Failed,
        MigrationState::Lost => Exit::Lost,
        _ => Exit::InDoubt,
    }
}

/// Shows every migration under way until there is none, or on a terminal for as long as somebody looks.
pub(super) async fn watch_all(client: &Client, out: &Out) -> Result<(), ClientError> {
    let mut watch = Watch::on_stderr(out.json);
    loop {
        let all: Vec<Migration> = client.get("/v1/migrations").await?;
        if out.json {
            out.json(&all);
        }
        watch.update_all(&all);
        if all.is_empty() && !std::io::stderr().is_terminal() {
            watch.finish();
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub(super) async fn check(
    client: &Client,
    out: &Out,
    name: &str,
    asked: &CheckAsked,
) -> Result<Exit, ClientError> {
    let report: CheckReport = client.post(&format!("/v1/guests/{}/check", segment(name)), asked).await?;
    out.show(&report, view::check_text);
    Ok(if report.ok { Exit::Completed } else { Exit::Failed })
}
