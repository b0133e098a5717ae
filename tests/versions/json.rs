//! What daemons and the processes that they start tell each other about a guest of QEMU, in JSON: fields are only added.

use std::fmt::Debug;

use pageferry::host::daemon::store::{GuestRecord, QemuRecord};
use pageferry::host::holder::protocol::{Command, Event, HolderState, QemuEnd, ReceiveSpec, Request, Told};
use pageferry::host::peer::messages::CheckRequest;
use pageferry::host::preflight::{GuestFacts, Versions};
use pageferry::host::qemu::{QemuFacts, QemuRam};
use pageferry::session::mode::TransferMode;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Recorded, recorded, understands};

fn json<T>(name: &'static str, value: T) -> Recorded
where
    T: Serialize + DeserializeOwned + PartialEq + Debug + Clone + 'static,
{
    let written = value.clone();
    recorded(
        name,
        move || serde_json::to_vec(&written).unwrap(),
        move |bytes| assert_eq!(serde_json::from_slice::<T>(bytes).unwrap(), value),
    )
}

fn check() -> CheckRequest {
    CheckRequest {
        source: "alpha".into(),
        versions: Versions {
            program: "0.1.0".into(),
            oldest_protocol: 1,
            newest_protocol: 1,
            guest_state: 1,
            oldest_guest_state: 1,
        },
        guest: GuestFacts {
            name: "qemu:/run/vm1-in.qmp".into(),
            kind: "qemu".into(),
            memory_bytes: 4 << 30,
            touched_bytes: 4 << 30,
            config: String::new(),
            qemu: Some(QemuFacts {
                version: "10.0.2".into(),
                machine: "pc-q35-10.0-machine".into(),
                runs: true,
                tls: false,
                ram: vec![QemuRam { name: "ram0".into(), bytes: 4 << 30 }],
            }),
        },
        mode: TransferMode::Compression,
    }
}

#[test]
fn a_guest_of_qemu() {
    let qemu = QemuEnd { qmp: "/run/vm1-in.qmp".into() };
    let receive = ReceiveSpec { ports: (7435, 7533), qemu: Some(qemu), ..ReceiveSpec::default() };
    let record: GuestRecord = serde_json::from_str(
        r#"{"instance":"5a5a5a5a","info":{"name":"qemu:/run/vm1.qmp","kind":"qemu","state":"moving","memory_bytes":4294967296,
            "pid":7,"since":1.5,"arrived_from":null,"migration":"5a","seen":null,"note":null}}"#,
    )
    .unwrap();
    // As it was before a QEMU could have a guest.
    assert_eq!((&record.qemu, record.promised_bytes), (&None, 0));
    let kept = QemuRecord { qmp: "/run/vm1.qmp".into(), runs: true };
    understands([
        json("peer-check-qemu", check()),
        json("holder-receive-qemu", Request { id: Some(3), command: Command::Receive(receive) }),
        json("holder-hello", Told { reply: None, event: Event::Hello(HolderState::default()) }),
        json("daemon-guest-qemu", GuestRecord { qemu: Some(kept), ..record }),
    ]);
}

#[test]
fn a_host_that_knows_no_qemu_is_told_apart() {
    let mut asked = serde_json::to_value(check()).unwrap();
    asked["guest"]["qemu"]["later"] = true.into();
    asked["later"] = true.into();
    assert_eq!(serde_json::from_value::<CheckRequest>(asked).unwrap(), check());
    // What a release without it says of itself has no word of it.
    let facts = r#"{"name":"beta","versions":{"program":"0.0.9","oldest_protocol":1,"newest_protocol":1,"guest_state":1,
        "oldest_guest_state":1},"offers":[],"memory":{"available":1,"cgroup_left":null,"memlock":null},"processor":"",
        "free_incoming":1,"max_incoming":1,"clock":1.0,"insecure":true}"#;
    let facts: pageferry::host::preflight::HostFacts = serde_json::from_str(facts).unwrap();
    assert!(!facts.takes_qemu);
}
