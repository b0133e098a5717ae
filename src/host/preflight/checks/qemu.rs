//! What the destination finds out about a QEMU that waits for a guest of another one.

use super::destination::memlock;
use super::{failed, passed, slots};
use crate::host::api::check::Check;
use crate::host::preflight::{GuestFacts, HostFacts};
use crate::host::qemu::QemuFacts;
use crate::units::Bytes;

/// All checks at the destination, of which `facts` are. `seen` is what the QEMU there is, or why it cannot take a guest in.
#[must_use]
pub fn at_destination(
    guest: &GuestFacts,
    theirs: &QemuFacts,
    facts: &HostFacts,
    seen: Result<QemuFacts, String>,
    wants_rdma: bool,
) -> Vec<Check> {
    let mut checks = match seen {
        Ok(ours) => vec![
            passed(
                "qemu",
                format!(
                    "the QEMU {} at {} waits for a guest of QEMU {}",
                    ours.version, facts.name, theirs.version
                ),
            ),
            machine(theirs, &ours, facts),
            ram(theirs, &ours, facts),
            tls(theirs, &ours, facts),
        ],
        Err(why) => vec![failed(
            "qemu",
            format!("{}: {why}", facts.name),
            format!(
                "start a QEMU at {} with the same machine, -incoming defer and -qmp unix:PATH,server=on,wait=off, and name that \
                 socket with --incoming qemu:PATH",
                facts.name
            ),
        )],
    };
    if wants_rdma && facts.no_rdma.is_none() {
        checks.push(memlock(guest, facts));
    }
    checks.push(slots(&facts.name, "incoming", facts.free_incoming, facts.max_incoming));
    checks
}

fn machine(theirs: &QemuFacts, ours: &QemuFacts, facts: &HostFacts) -> Check {
    const NAME: &str = "qemu-machine";
    if theirs.machine == ours.machine || theirs.machine.is_empty() || ours.machine.is_empty() {
        return passed(NAME, format!("both QEMUs have the machine {}", word(&theirs.machine)));
    }
    failed(
        NAME,
        format!("the machine is {} at the source and {} at {}", theirs.machine, ours.machine, facts.name),
        format!(
            "start the QEMU at {} with -machine {}",
            facts.name,
            theirs.machine.trim_end_matches("-machine")
        ),
    )
}

fn word(machine: &str) -> &str {
    if machine.is_empty() { "that they are started with" } else { machine }
}

fn ram(theirs: &QemuFacts, ours: &QemuFacts, facts: &HostFacts) -> Check {
    const NAME: &str = "qemu-ram";
    let advice = format!("give the QEMU at {} the same -m and -object options as the source's", facts.name);
    for wanted in &theirs.ram {
        let Some(there) = ours.ram.iter().find(|there| there.name == wanted.name) else {
            return failed(
                NAME,
                format!("the QEMU at {} has no RAM block {}", facts.name, wanted.name),
                advice,
            );
        };
        if there.bytes != wanted.bytes {
            let (source, here) = (Bytes(wanted.bytes), Bytes(there.bytes));
            let finding =
                format!("RAM block {} has {source} at the source and {here} at {}", wanted.name, facts.name);
            return failed(NAME, finding, advice);
        }
    }
    passed(NAME, format!("both QEMUs have {} of RAM", Bytes(theirs.memory_bytes())))
}

fn tls(theirs: &QemuFacts, ours: &QemuFacts, facts: &HostFacts) -> Check {
    const NAME: &str = "qemu-tls";
    match (theirs.tls, ours.tls) {
        (false, false) => passed(NAME, "neither QEMU encrypts by itself"),
        (true, true) => passed(NAME, "both QEMUs encrypt by themselves: their bytes are carried as they are"),
        (source, _) => failed(
            NAME,
            format!(
                "TLS is set in QEMU (tls-creds) at {} only",
                if source { "the source" } else { &facts.name }
            ),
            "set it at both, or at neither and let pageferry encrypt",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::api::check::CheckStatus;
    use crate::host::preflight::checks::tests::{guest, host};
    use crate::host::qemu::QemuRam;

    fn qemu() -> QemuFacts {
        QemuFacts {
            version: "10.0.2".into(),
            machine: "pc-q35-10.0-machine".into(),
            runs: true,
            tls: false,
            ram: vec![QemuRam { name: "ram0".into(), bytes: 256 << 20 }],
        }
    }

    fn failed_of(seen: Result<QemuFacts, String>) -> Vec<(String, String, String)> {
        let checks = at_destination(&guest("qemu"), &qemu(), &host("beta", 2), seen, false);
        let failed = checks.into_iter().filter(|check| check.status == CheckStatus::Failed);
        failed.map(|check| (check.name, check.finding, check.advice.unwrap_or_default())).collect()
    }

    #[test]
    fn the_same_machine_passes_and_each_difference_is_named() {
        assert_eq!(failed_of(Ok(qemu())), []);
        // An older QEMU may not say its machine.
        assert_eq!(failed_of(Ok(QemuFacts { machine: String::new(), ..qemu() })), []);
        let ram = |name: &str, bytes| vec![QemuRam { name: name.into(), bytes }];
        for (ours, name, finding, advice) in [
            (
                QemuFacts { machine: "pc-q35-9.2-machine".into(), ..qemu() },
                "qemu-machine",
                "pc-q35-9.2-machine at beta",
                "-machine pc-q35-10.0",
            ),
            (QemuFacts { ram: ram("ram0", 1 << 20), ..qemu() }, "qemu-ram", "1 MiB at beta", "same -m"),
            (
                QemuFacts { ram: ram("pc.ram", 256 << 20), ..qemu() },
                "qemu-ram",
                "no RAM block ram0",
                "same -m",
            ),
            (QemuFacts { tls: true, ..qemu() }, "qemu-tls", "at beta only", "or at neither"),
        ] {
            let failed = failed_of(Ok(ours));
            assert_eq!(failed.len(), 1, "{failed:?}");
            let (said, found, advised) = &failed[0];
            assert_eq!(said, name);
            assert!(found.contains(finding) && advised.contains(advice), "{failed:?}");
        }
    }

    #[test]
    fn a_qemu_that_cannot_take_a_guest_in_is_the_only_finding() {
        let failed = failed_of(Err("no QEMU answers at /run/in.qmp".into()));
        assert_eq!(failed.len(), 1);
        assert!(failed[0].1.contains("beta: no QEMU answers at /run/in.qmp"), "{failed:?}");
        assert!(failed[0].2.contains("-incoming defer"), "{failed:?}");
    }
}
