//! What the destination finds out when it is asked whether a guest may come.

use super::{failed, note, passed, slots};
use crate::guest::{MAX_CONFIG_BYTES, ProcessorError};
use crate::host::api::check::Check;
use crate::host::guests::check_processor;
use crate::host::preflight::{GuestFacts, HostFacts, MemoryFacts};
use crate::units::Bytes;

/// All checks at the destination, of which `facts` are. `name_in_use` says what has the guest's name there, such as
/// `it runs there`.
#[must_use]
pub fn at_destination(
    guest: &GuestFacts,
    facts: &HostFacts,
    name_in_use: Option<&str>,
    wants_rdma: bool,
) -> Vec<Check> {
    let mut checks = vec![kvm(guest, facts)];
    // Without KVM nothing tells what a guest would see of the processor, and the check before has failed.
    if guest.kind != "kvm" || facts.why_no_kvm.is_none() {
        checks.push(cpu(guest, facts, fits(guest)));
    }
    checks.push(memory(guest, facts));
    if wants_rdma && facts.no_rdma.is_none() {
        checks.push(memlock(guest, facts));
    }
    checks.push(name(guest, facts, name_in_use));
    checks.push(slots(&facts.name, "incoming", facts.free_incoming, facts.max_incoming));
    checks
}

fn kvm(guest: &GuestFacts, facts: &HostFacts) -> Check {
    let host = &facts.name;
    match (guest.kind.as_str(), &facts.why_no_kvm) {
        ("process", _) => passed("kvm", "a process guest needs no KVM"),
        ("kvm", None) => passed("kvm", format!("{host} has KVM")),
        ("kvm", Some(why)) => failed(
            "kvm",
            format!("{host} can hold no KVM guest: {why}"),
            format!(
                "see at {host} that virtualisation is on in the firmware, that the module is loaded (modprobe kvm_intel or \
                 kvm_amd) and that the daemon may open /dev/kvm"
            ),
        ),
        (other, _) => failed(
            "kvm",
            format!("{host} knows no guests of kind {other:?}"),
            format!("run the same release of pageferry on both hosts; {host} has {}", facts.versions.program),
        ),
    }
}

fn fits(guest: &GuestFacts) -> Result<(), ProcessorError> {
    let config = bytes_of_hex(&guest.config).map_err(|what| {
        ProcessorError::Config(crate::guest::GuestError::new(format!("the guest's configuration {what}")))
    })?;
    check_processor(&guest.kind, &config)
}

fn bytes_of_hex(text: &str) -> Result<Vec<u8>, &'static str> {
    if text.len() > 2 * MAX_CONFIG_BYTES {
        return Err("is longer than one can be");
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    pairs.collect::<Option<_>>().ok_or("is no row of bytes in hexadecimal digits")
}

pub(super) fn cpu(guest: &GuestFacts, facts: &HostFacts, fits: Result<(), ProcessorError>) -> Check {
    let host = &facts.name;
    let error = match fits {
        Ok(()) if guest.kind == "kvm" => {
            return passed(
                "cpu",
                format!("{host}'s processor ({}) has all that the guest uses", facts.processor),
            );
        }
        Ok(()) => return passed("cpu", "a process guest runs on any processor"),
        Err(error) => error,
    };
    let finding = format!("{host} ({}): {}", facts.processor, with_causes(&error));
    let advice = match error {
        ProcessorError::Config(_) => "run the same release of pageferry on both hosts".to_owned(),
        ProcessorError::Host(_) => format!("see that the daemon at {host} may use /dev/kvm"),
        ProcessorError::Unfit(_) => {
            "choose a host with a processor of the same vendor that is as new, or start the guest \
                                     anew there"
                .to_owned()
        }
    };
    failed("cpu", finding, advice)
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What the guest uses must be there now. What it has not touched costs nothing until it does, and may come to fit; a person
/// should know.
fn memory(guest: &GuestFacts, facts: &HostFacts) -> Check {
    let (host, room) = (&facts.name, Room::of(&facts.memory));
    let (touched, whole) = (Bytes(guest.touched_bytes), Bytes(guest.memory_bytes));
    if touched > room.bytes {
        return failed(
            "memory",
            format!("the guest uses {touched} of memory and {host} has {} for it: {}", room.bytes, room.why),
            format!("stop or move guests at {host}, or give it more memory; nothing is overcommitted"),
        );
    }
    if whole > room.bytes {
        return note(
            "memory",
            format!(
                "{host} has {} for the guest: enough for the {touched} that it uses, not for all its {whole}: {}",
                room.bytes, room.why
            ),
            format!("see that {host} gets more memory before the guest uses more"),
        );
    }
    passed("memory", format!("{host} has {} for the guest's {whole}, of which it uses {touched}", room.bytes))
}

/// How much memory a host has for one more guest.
struct Room {
    bytes: Bytes,
    why: String,
}

impl Room {
    fn of(memory: &MemoryFacts) -> Self {
        let available = Bytes(memory.available);
        let (most, mut why) = match memory.cgroup_left {
            Some(left) if left < memory.available => {
                (left, format!("its control group leaves {} of {available} available", Bytes(left)))
            }
            _ => (memory.available, format!("{available} are available")),
        };
        if memory.promised > 0 {
            why += &format!(", {} are promised to guests on their way", Bytes(memory.promised));
        }
        Self { bytes: Bytes(most.saturating_sub(memory.promised)), why }
    }
}

/// RDMA registers, and so locks, all of a guest's memory.
pub(super) fn memlock(guest: &GuestFacts, facts: &HostFacts) -> Check {
    let (host, whole) = (&facts.name, Bytes(guest.memory_bytes));
    match facts.memory.memlock {
        Some(limit) if limit < guest.memory_bytes => failed(
            "memlock",
            format!(
                "RDMA locks the guest's memory, {whole}, and the daemon at {host} may lock {}",
                Bytes(limit)
            ),
            format!(
                "set LimitMEMLOCK=infinity for the daemon at {host}, give it CAP_IPC_LOCK, or choose another mode"
            ),
        ),
        _ => passed("memlock", format!("{host} may lock the guest's {whole}")),
    }
}

pub(super) fn name(guest: &GuestFacts, facts: &HostFacts, in_use: Option<&str>) -> Check {
    let (host, name) = (&facts.name, &guest.name);
    match in_use {
        None => passed("name", format!("no guest at {host} is called {name}")),
        Some(how) => failed(
            "name",
            format!("the name {name} is in use at {host}: {how}"),
            format!("stop or move the guest of that name at {host} first"),
        ),
    }
}
