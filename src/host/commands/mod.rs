//! What the command line has this host's daemon do.

mod guest;
mod migrate;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::host::api::client::{Client, ClientError, segment};
use crate::host::api::guest::StartGuest;
use crate::host::api::host::{Done, HostInfo};
use crate::host::api::migration::{MigrateRequest, Migration};
use crate::host::config;
use crate::host::daemon::routes::CheckAsked;
use crate::host::exit::Exit;
use crate::host::view;

/// What a command needs to know besides what it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandOptions {
    /// The host file that names the daemon's socket; nothing is the default one.
    pub config: Option<PathBuf>,
    /// The socket itself, in place of what the host file says.
    pub socket: Option<PathBuf>,
    /// Whether the answer goes out as one JSON object or array.
    pub json: bool,
}

/// What the daemon is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum HostCommand {
    /// `host`.
    Host,
    /// `guest start`.
    GuestStart(StartGuest),
    /// `guest list`.
    GuestList,
    /// `guest show`.
    GuestShow(String),
    /// `guest verify`.
    GuestVerify(String),
    /// `guest stop`.
    GuestStop(String),
    /// `guest console`; with true until it is interrupted.
    GuestConsole(String, bool),
    /// `migrate`: the guest, how, and whether to return at once.
    Migrate(String, Box<MigrateRequest>, bool),
    /// `check`: the guest, and what is asked.
    Check(String, CheckAsked),
    /// `status`: of one migration or all; with true until it is over.
    Status(Option<String>, bool),
    /// `cancel`.
    Cancel(String),
    /// `history`: how many.
    History(usize),
    /// `report`: of which migration, and the file that it goes to.
    Report(String, Option<PathBuf>),
}

/// Has it done.
#[must_use]
pub fn run(options: &CommandOptions, command: &HostCommand) -> Exit {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(options, &ClientError::Broken(error.to_string())),
    };
    let socket = match socket(options) {
        Ok(socket) => socket,
        Err(error) => return fail(options, &ClientError::HostFile(error)),
    };
    let out = Out { json: options.json };
    match runtime.block_on(obey(&Client::new(&socket), &out, command)) {
        Ok(exit) => exit,
        Err(error) => fail(options, &error),
    }
}

fn fail(options: &CommandOptions, error: &ClientError) -> Exit {
    if options.json {
        Out { json: true }.json(&error.as_api_error());
    }
    eprintln!("pageferry: {error}");
    Exit::Failed
}

fn socket(options: &CommandOptions) -> Result<PathBuf, config::HostFileError> {
    match &options.socket {
        Some(socket) => Ok(socket.clone()),
        None => Ok(config::load(options.config.as_deref())?.config.socket),
    }
}

/// Where answers go.
struct Out {
    json: bool,
}

impl Out {
    /// For programs: one line.
    fn json(&self, value: &impl Serialize) {
        if let Ok(text) = serde_json::to_string(value) {
            self.line(&text);
        }
    }

    /// A reader that has gone is no error: what was asked for was done.
    fn line(&self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// For programs or for people.
    fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            self.json(value);
        } else {
            self.line(text(value).trim_end());
        }
    }
}

async fn obey(client: &Client, out: &Out, command: &HostCommand) -> Result<Exit, ClientError> {
    match command {
        HostCommand::Host => {
            let info: HostInfo = client.get("/v1/host").await?;
            out.show(&info, host_text);
        }
        HostCommand::GuestStart(asked) => return guest::start(client, out, asked).await,
        HostCommand::GuestList => guest::list(client, out).await?,
        HostCommand::GuestShow(name) => guest::show(client, out, name).await?,
        HostCommand::GuestVerify(name) => return guest::verify(client, out, name).await,
        HostCommand::GuestStop(name) => {
            let done: Done = client.delete(&format!("/v1/guests/{}", segment(name))).await?;
            out.show(&done, |done| done.what.clone());
        }
        HostCommand::GuestConsole(name, follow) => guest::console(client, out, name, *follow).await?,
        HostCommand::Migrate(name, request, detach) => {
            return migrate::migrate(client, out, name, request, *detach).await;
        }
        HostCommand::Check(name, asked) => return migrate::check(client, out, name, asked).await,
        HostCommand::Status(Some(id), watch) => return migrate::status(client, out, id, *watch).await,
        HostCommand::Status(None, false) => {
            let all: Vec<Migration> = client.get("/v1/migrations").await?;
            out.show(&all, |all| view::status_table(all));
        }
        HostCommand::Status(None, true) => migrate::watch_all(client, out).await?,
        HostCommand::Cancel(id) => {
            let done: Done = client.post(&format!("/v1/migrations/{}/cancel", segment(id)), &()).await?;
            out.show(&done, |done| done.what.clone());
        }
        HostCommand::History(limit) => {
            let all: Vec<Migration> = client.get(&format!("/v1/history?limit={limit}")).await?;
            out.show(&all, |all| view::history_table(all));
        }
        HostCommand::Report(id, to) => return report(client, out, id, to.as_deref()).await,
    }
    Ok(Exit::Completed)
}

fn host_text(info: &HostInfo) -> String {
    let mut lines = vec![
        format!("{} (pageferry {}, process {})", info.name, info.version, info.pid),
        format!("host file   {}", info.host_file.as_deref().unwrap_or("none, so defaults")),
        format!("mode        {}", info.performance_option),
        format!(
            "migrations  {} out and {} in, of {} each",
            info.outgoing, info.incoming, info.max_migrations
        ),
        format!(
            "listens at  {}",
            if info.listening.is_empty() { "nothing".into() } else { info.listening.join(", ") }
        ),
    ];
    for offer in &info.offers {
        let speed = offer
            .speed_bits_per_second
            .map_or("speed unknown".into(), |speed| format!("{} Mbit/s", speed / 1_000_000));
        lines.push(format!(
            "network     {} {}/{}, MTU {}, {speed}",
            offer.interface, offer.address, offer.prefix, offer.mtu
        ));
    }
    lines.extend(info.warnings.iter().map(|warning| format!("warning     {warning}")));
    lines.join("\n")
}

async fn report(client: &Client, out: &Out, id: &str, to: Option<&Path>) -> Result<Exit, ClientError> {
    let found: Migration = client.get(&format!("/v1/migrations/{}", segment(id))).await?;
    let page = client.text(&format!("/v1/migrations/{}/report", segment(&found.id))).await?;
    // A guest of QEMU is called by a path.
    let guest = found.guest.replace(['/', ':'], "-");
    let default = PathBuf::from(format!("pageferry-{guest}-{}.html", &found.id[..found.id.len().min(8)]));
    let path = to.map_or(default, Path::to_owned);
    std::fs::write(&path, page).map_err(|cause| ClientError::Write { path: path.clone(), cause })?;
    let done = Done { what: format!("{}", path.display()) };
    out.show(&done, |done| format!("the report is in {}", done.what));
    Ok(Exit::Completed)
}
