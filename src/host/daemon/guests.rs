//! Guests of this host: started, asked, stopped.

use std::sync::Arc;
use std::time::Duration;

use super::store::{GuestRecord, QemuRecord};
use super::tables::Guest;
use super::{ANSWER, Daemon, now, watch};
use crate::dirty::TrackerKind;
use crate::host::api::guest::{GuestInfo, GuestState, StartGuest};
use crate::host::demo_options::{GuestKind, MAX_VCPUS};
use crate::host::guest_process::{Attached, GuestProcess, GuestProcessError, SpawnOptions};
use crate::host::guests::{best_tracker, why_no_kvm};
use crate::host::holder::protocol::{Command, Event, GuestSeen, GuestSpec};
use crate::memory::HugePages;
use crate::units::PAGE_SIZE;

/// How long a guest may take to write all its memory once.
const START: Duration = Duration::from_secs(610);
/// How long a process may take to end when it was told.
const END: Duration = Duration::from_secs(10);
/// A guest has so many letters in its name at most.
const LONGEST_NAME: usize = 64;

/// Why a guest cannot be started, asked or stopped.
#[derive(Debug, thiserror::Error)]
pub enum GuestFailure {
    /// It is not there.
    #[error("there is no guest {0:?} on this host; `pageferry guest list` shows those that are")]
    Unknown(String),
    /// It cannot be, or not now.
    #[error("{0}")]
    Refused(String),
    /// Its process.
    #[error(transparent)]
    Process(#[from] GuestProcessError),
    /// It cannot be written down.
    #[error("{0}")]
    Store(String),
}

impl Daemon {
    /// Starts a guest, and waits until it has written all its memory once.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn start_guest(self: &Arc<Self>, asked: StartGuest) -> Result<GuestInfo, GuestFailure> {
        let spec = spec(&asked, self.settings().config().huge_pages)?;
        let info = GuestInfo {
            memory_bytes: spec.memory_bytes,
            ..GuestInfo::new(&asked.name, spec.kind.name(), GuestState::Starting, now())
        };
        let attached = self.new_process(info, 0, None).await?;
        let name = asked.name.as_str();
        watch::watch(self, name, attached);
        let process = self.process(name)?;
        match process.request(Command::Start(spec), START).await {
            Ok(_) => {
                self.guest_is(name, GuestState::Running, None);
                self.guest(name).await
            }
            Err(error) => {
                // The process has nothing then, and ends.
                self.with_guest(name, |guest| guest.stopping = true);
                if process.request(Command::Stop, ANSWER).await.is_err() {
                    self.remove_guest(name);
                }
                Err(error.into())
            }
        }
    }

    /// Takes a name and starts a process for it.
    pub(super) async fn new_process(
        &self,
        info: GuestInfo,
        promised: u64,
        qemu: Option<QemuRecord>,
    ) -> Result<Attached, GuestFailure> {
        let name = info.name.clone();
        let instance = self.new_instance();
        let record = GuestRecord { instance: instance.clone(), info, promised_bytes: promised, qemu };
        {
            let mut tables = self.tables();
            if let Some(there) = tables.guests.get(&name) {
                return Err(GuestFailure::Refused(in_use(there)));
            }
            self.store
                .put_guest(&record)
                .map_err(|error| GuestFailure::Store(crate::engine::chain(&error)))?;
            tables.guests.insert(name.clone(), Guest { record, process: None, stopping: false });
        }
        let spawned = self.spawn_process(&instance).await;
        if spawned.is_err() {
            self.remove_guest(&name);
        }
        Ok(spawned?)
    }

    /// Starts a process for a guest that is in the tables.
    pub(super) async fn spawn_process(&self, instance: &str) -> Result<Attached, GuestProcessError> {
        let options = SpawnOptions {
            socket: self.store.socket(instance),
            journal: self.store.journal(),
            log: self.store.log(instance),
        };
        GuestProcess::spawn(&options).await
    }

    /// Why a name cannot be taken by a guest that arrives.
    #[must_use]
    pub fn name_in_use(&self, name: &str) -> Option<String> {
        self.tables().guests.get(name).map(in_use)
    }

    pub(super) fn process(&self, name: &str) -> Result<Arc<GuestProcess>, GuestFailure> {
        let tables = self.tables();
        let guest = tables.guests.get(name).ok_or_else(|| GuestFailure::Unknown(name.to_owned()))?;
        let gone = || {
            GuestFailure::Refused(guest.record.info.note.clone().unwrap_or("its process has ended".into()))
        };
        guest.process.clone().ok_or_else(gone)
    }

    /// A guest, with what it has seen of itself where it can be asked.
    ///
    /// # Errors
    /// [`GuestFailure::Unknown`].
    pub async fn guest(&self, name: &str) -> Result<GuestInfo, GuestFailure> {
        let info = {
            let tables = self.tables();
            let guest = tables.guests.get(name).ok_or_else(|| GuestFailure::Unknown(name.to_owned()))?;
            guest.record.info.clone()
        };
        let seen = self.seen(&info).await;
        Ok(GuestInfo { seen, ..info })
    }

    async fn seen(&self, info: &GuestInfo) -> Option<GuestSeen> {
        if info.state != GuestState::Running {
            return None;
        }
        match self.process(&info.name).ok()?.request(Command::Report, ANSWER).await {
            Ok(Event::Guest(seen)) => Some(seen),
            _ => None,
        }
    }

    /// Has a guest look at every page that it wrote.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn verify_guest(&self, name: &str) -> Result<GuestSeen, GuestFailure> {
        match self.process(name)?.request(Command::Verify, START).await? {
            Event::Guest(seen) => Ok(seen),
            other => Err(GuestFailure::Refused(format!("the guest's process answers {other:?}"))),
        }
    }

    /// What came out of a guest's serial port since somebody asked last.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn console(&self, name: &str) -> Result<String, GuestFailure> {
        match self.process(name)?.request(Command::Console, ANSWER).await? {
            Event::Console { text } => Ok(text),
            other => Err(GuestFailure::Refused(format!("the guest's process answers {other:?}"))),
        }
    }

    /// Ends a guest; one that is lost already is forgotten.
    ///
    /// # Errors
    /// [`GuestFailure`].
    pub async fn stop_guest(&self, name: &str) -> Result<String, GuestFailure> {
        let process = {
            let mut tables = self.tables();
            let guest = tables.guests.get_mut(name).ok_or_else(|| GuestFailure::Unknown(name.to_owned()))?;
            if guest.record.info.state == GuestState::Lost {
                None
            } else {
                guest.stopping = guest.record.info.state == GuestState::Running;
                guest.process.clone()
            }
        };
        let Some(process) = process else {
            self.remove_guest(name);
            return Ok(format!("{name} was lost, and is forgotten"));
        };
        if let Err(error) = process.request(Command::Stop, ANSWER).await {
            self.with_guest(name, |guest| guest.stopping = false);
            return Err(error.into());
        }
        let began = std::time::Instant::now();
        while self.tables().guests.contains_key(name) {
            if began.elapsed() > END {
                let pid = process.pid();
                return Err(GuestFailure::Refused(format!(
                    "the process {pid} of {name} was told to end and has not within {} s",
                    END.as_secs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(format!("{name} has ended"))
    }
}

fn in_use(guest: &Guest) -> String {
    let info = &guest.record.info;
    match info.state {
        GuestState::Arriving => format!("a guest {:?} is on its way here", info.name),
        GuestState::Lost => {
            format!("a guest {0:?} was lost here; `pageferry guest stop {0}` forgets it", info.name)
        }
        _ => format!("there is a guest {:?} on this host already", info.name),
    }
}

/// What was asked for, checked.
fn spec(asked: &StartGuest, huge_pages: HugePages) -> Result<GuestSpec, GuestFailure> {
    let refused = |why: String| Err(GuestFailure::Refused(why));
    check_name(&asked.name).map_err(GuestFailure::Refused)?;
    if asked.memory_bytes == 0 || !asked.memory_bytes.is_multiple_of(PAGE_SIZE) {
        return refused(format!("{} bytes are no whole number of 4 KiB pages", asked.memory_bytes));
    }
    if asked.memory_bytes > crate::layout::MAX_BYTES {
        return refused(format!("a guest has at most {} bytes", crate::layout::MAX_BYTES));
    }
    if !(1..=MAX_VCPUS).contains(&asked.vcpus) {
        return refused(format!("a guest has 1 to {MAX_VCPUS} vCPUs, not {}", asked.vcpus));
    }
    let kind = match (asked.kind, why_no_kvm()) {
        (Some(GuestKind::Kvm), Some(why)) => {
            return refused(format!("there can be no KVM guest here: {why}"));
        }
        (Some(kind), _) => kind,
        (None, None) => GuestKind::Kvm,
        (None, Some(_)) => GuestKind::Process,
    };
    let tracker = asked.tracker.unwrap_or(best_tracker(kind));
    let fits = match tracker {
        TrackerKind::Log | TrackerKind::Ring => kind == GuestKind::Kvm,
        TrackerKind::Pagemap => true,
        TrackerKind::Synthetic => false,
    };
    if !fits {
        return refused(format!("a {} guest cannot be tracked by {}", kind.name(), tracker.name()));
    }
    Ok(GuestSpec {
        kind,
        memory_bytes: asked.memory_bytes,
        touch_bytes: asked.touch_bytes,
        vcpus: asked.vcpus,
        program: asked.program,
        dirty_bytes_per_second: asked.dirty_bytes_per_second,
        seed: asked.seed,
        tracker,
        huge_pages,
    })
}

/// Whether a text can be a guest's name: it becomes a file's.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins && name.len() <= LONGEST_NAME && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(format!(
        "{name:?} is no name of a guest: it has letters, digits, '-', '_' and '.', at most {LONGEST_NAME}, and begins with a \
         letter or digit"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_no_path() {
        for name in ["a", "vm-1", "Web_2.example", "0"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for name in ["", ".", "..", "-a", "a/b", "a b", "ä", "a\n", &"a".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
