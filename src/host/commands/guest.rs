//! `pageferry guest ...`.

use std::io::Write as _;
use std::time::Duration;

use super::Out;
use crate::host::api::client::{Client, ClientError, segment};
use crate::host::api::guest::{GuestInfo, StartGuest};
use crate::host::api::host::ConsoleText;
use crate::host::daemon::routes::Seen;
use crate::host::exit::Exit;
use crate::host::progress::{Progress, ProgressState};
use crate::host::view;
use crate::units::Bytes;

/// How often a console is looked at.
const CONSOLE: Duration = Duration::from_millis(300);
/// How often a person is told that it is being waited.
const TICK: Duration = Duration::from_millis(500);

pub(super) async fn start(client: &Client, out: &Out, asked: &StartGuest) -> Result<Exit, ClientError> {
    let mut progress = Progress::on_stderr(out.json, false);
    let used = asked.touch_bytes.unwrap_or(asked.memory_bytes);
    let phase = format!("starting {}: it writes its {} once", asked.name, Bytes(used));
    let state = ProgressState { phase, ..ProgressState::default() };
    let starting = client.post::<_, GuestInfo>("/v1/guests", asked);
    tokio::pin!(starting);
    let started = loop {
        tokio::select! {
            started = &mut starting => break started,
            () = tokio::time::sleep(TICK) => progress.update(&state),
        }
    };
    progress.finish();
    out.show(&started?, |guest| {
        let pid = guest.pid.map_or_else(String::new, |pid| format!(", process {pid}"));
        format!("{} runs: a {} guest of {}{pid}", guest.name, guest.kind, Bytes(guest.memory_bytes))
    });
    Ok(Exit::Completed)
}

pub(super) async fn list(client: &Client, out: &Out) -> Result<(), ClientError> {
    let all: Vec<GuestInfo> = client.get("/v1/guests").await?;
    out.show(&all, |all| view::guest_table(all));
    Ok(())
}

pub(super) async fn show(client: &Client, out: &Out, name: &str) -> Result<(), ClientError> {
    let guest: GuestInfo = client.get(&format!("/v1/guests/{}", segment(name))).await?;
    out.show(&guest, |guest| {
        let table = view::guest_table(std::slice::from_ref(guest));
        match &guest.seen {
            Some(seen) => format!(
                "{table}\n{} heartbeats, {} pages written, {} verified, {} corrupt",
                seen.heartbeats, seen.writes, seen.verified, seen.corrupt
            ),
            None => table,
        }
    });
    Ok(())
}

pub(super) async fn verify(client: &Client, out: &Out, name: &str) -> Result<Exit, ClientError> {
    let seen: Seen = client.post(&format!("/v1/guests/{}/verify", segment(name)), &()).await?;
    let corrupt = seen.seen.corrupt;
    out.show(&seen, |seen| match corrupt {
        0 => format!(
            "{name} looked at every page that it ever wrote: all are as it left them ({} looks so far)",
            seen.seen.verified
        ),
        corrupt => format!("{name} found {corrupt} pages damaged"),
    });
    Ok(if corrupt == 0 { Exit::Completed } else { Exit::Damaged })
}

pub(super) async fn console(client: &Client, out: &Out, name: &str, follow: bool) -> Result<(), ClientError> {
    loop {
        let console: ConsoleText = client.get(&format!("/v1/guests/{}/console", segment(name))).await?;
        if out.json {
            out.json(&console);
        } else {
            let mut stdout = std::io::stdout();
            if stdout.write_all(console.text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
                // Nobody reads any more.
                return Ok(());
            }
        }
        if !follow {
            return Ok(());
        }
        tokio::time::sleep(CONSOLE).await;
    }
}
