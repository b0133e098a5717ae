//! What two relays say to each other.

use pageferry::wire::relay::{Answer, Block, Offer, RelayMessage};

use super::{Recorded, SECRET, recorded, understands};

fn relayed(name: &'static str, message: RelayMessage) -> Recorded {
    let written = message.clone();
    recorded(
        name,
        move || written.encode(),
        move |bytes| assert_eq!(RelayMessage::decode(bytes).unwrap(), message),
    )
}

#[test]
fn messages_of_a_relay() {
    let block = |name: &str, bytes, shared| Block { name: name.into(), bytes, backend: shared, shared };
    let offer = Offer {
        hypervisor: "QEMU 10.0.2".into(),
        blocks: vec![block("ram0", 4 << 30, true), block("pc.bios", 256 << 10, false)],
        channels: 4,
        return_path: true,
        tls: false,
        placement: true,
        staging_bytes: 64 << 20,
        mode: "compression".into(),
        capabilities: vec!["zstd".into()],
    };
    let answer = Answer {
        secret: SECRET.0,
        hypervisor: "QEMU 9.2.0".into(),
        placed: vec![0],
        because: "at the destination, RAM block ram1 is private".into(),
        capabilities: vec!["zstd".into(), "another".into()],
    };
    understands([
        relayed("relay-offer", RelayMessage::Offer(offer)),
        relayed("relay-answer", RelayMessage::Answer(answer)),
        relayed("relay-bytes", RelayMessage::Bytes { stream: 3, bytes: (0..=255).collect() }),
        relayed("relay-end", RelayMessage::End { stream: 255 }),
        relayed(
            "relay-packet",
            RelayMessage::Packet { stream: 2, header: vec![7; 1344], page: 384, bytes: 524_288 },
        ),
        relayed("relay-passed", RelayMessage::Passed { stream: 1, bytes: 65_536 }),
        relayed("relay-free", RelayMessage::Free { page: 16_256 }),
        relayed("relay-loaded", RelayMessage::Loaded),
        relayed("relay-commit", RelayMessage::Commit { run: true }),
        relayed("relay-commit-paused", RelayMessage::Commit { run: false }),
        relayed("relay-running", RelayMessage::Running),
        relayed("relay-fenced", RelayMessage::Fenced("its disks are locked".into())),
        relayed("relay-abort", RelayMessage::Abort("QEMU has ended".into())),
    ]);
}
