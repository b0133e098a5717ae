//! What version 1 wrote is still understood, and versions that differ are told apart. The rules are in `docs/versions.md`.
//!
//! `tests/recorded/v1` holds bytes as version 1 of the protocol sent them and as its guests were described. They are never
//! written anew: `PAGEFERRY_WRITE_RECORDED=1` adds only what is not there yet.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

#[cfg(feature = "cli")]
mod json;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
mod kvm;
mod rdma;
mod relay;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::codec::Decompressor;
use pageferry::engine::journal::Journal;
use pageferry::guest::Guest;
use pageferry::guest::process::{Fill, ProcessConfig, ProcessGuest};
use pageferry::guest::program::{Program, ProgramConfig, SelfChecking, SelfReport};
use pageferry::layout::{RamLayout, RamRegion};
use pageferry::memory::{Backing, HugePages};
use pageferry::migration::handover::Decision;
use pageferry::session::{self, Capabilities, Encryption};
use pageferry::units::{GuestAddress, PageIndex, RoundId, Run};
use pageferry::wire::control::{Accept, Message, Setup, Token};
use pageferry::wire::data::{
    BarrierId, ChannelId, FrameKind, HEADER_BYTES, Header, Receipt, ReceiptHeader, encode_barrier,
    encode_pages, encode_written,
};
use pageferry::wire::link::{LinkHeader, LinkKind};
use pageferry::wire::preamble::{
    MigrationId, Preamble, PreambleError, Purpose, RefusalCode, Reply, ReplyHeader, Secret, Versions,
};

const V1: Versions = Versions { oldest: 1, newest: 1 };
const MIGRATION: MigrationId = MigrationId([0x5a; 16]);
const SECRET: Secret = Secret([0xc3; 32]);
const TOKEN: Token = Token([0x17; 16]);

type Write = Box<dyn Fn() -> Vec<u8>>;
type Look = Box<dyn Fn(&[u8])>;

/// Something that version 1 wrote.
struct Recorded {
    name: &'static str,
    /// What this version writes in its place; only for recording.
    written: Write,
    /// Fails unless this version understands the bytes as what they were.
    understood: Look,
}

fn recorded(
    name: &'static str,
    written: impl Fn() -> Vec<u8> + 'static,
    understood: impl Fn(&[u8]) + 'static,
) -> Recorded {
    Recorded { name, written: Box::new(written), understood: Box::new(understood) }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded/v1")
}

/// The bytes of a recorded file, which is made first where that is asked for and it is not there.
fn bytes_of(recorded: &Recorded) -> Vec<u8> {
    let path = folder().join(format!("{}.bin", recorded.name));
    if std::env::var_os("PAGEFERRY_WRITE_RECORDED").is_some() && !path.exists() {
        fs::create_dir_all(folder()).expect("the folder can be made");
        fs::write(&path, (recorded.written)()).expect("a recorded file can be written");
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn understands(all: impl IntoIterator<Item = Recorded>) {
    for recorded in all {
        println!("{}", recorded.name);
        (recorded.understood)(&bytes_of(&recorded));
    }
}

fn preamble(name: &'static str, purpose: Purpose, secret: Secret) -> Recorded {
    recorded(
        name,
        move || Preamble::new(purpose, MIGRATION, secret).encode().to_vec(),
        move |bytes| {
            let preamble = Preamble::decode(bytes.try_into().unwrap()).unwrap();
            assert_eq!((preamble.versions, preamble.purpose, preamble.migration), (V1, purpose, MIGRATION));
            assert_eq!(preamble.proves(&secret), !secret.is_none());
            assert!(!preamble.proves(&Secret([1; 32])));
        },
    )
}

fn reply(name: &'static str, reply: Reply) -> Recorded {
    let written = Reply { versions: V1, ..reply };
    let expected = written.clone();
    recorded(
        name,
        move || written.encode(),
        move |bytes| {
            let (head, text) = bytes.split_first_chunk().unwrap();
            let header = ReplyHeader::decode(head).unwrap();
            assert_eq!(header.text_bytes(), text.len());
            assert_eq!(header.with_text(text).unwrap(), expected);
        },
    )
}

#[test]
fn first_bytes_of_connections() {
    let refused = Reply::refused;
    understands([
        preamble("preamble-new", Purpose::NewMigration, Secret::NONE),
        preamble("preamble-new-admitted", Purpose::NewMigration, SECRET),
        preamble("preamble-resume", Purpose::ResumeControl { attempt: 3, received: 70_000 }, SECRET),
        preamble("preamble-data", Purpose::Data { channel: 1023 }, SECRET),
        preamble("preamble-rdma", Purpose::RdmaData { channel: 1022 }, SECRET),
        preamble("preamble-query", Purpose::Query, Secret::NONE),
        reply("reply-accepted", Reply::accepted(0)),
        reply("reply-resumed", Reply::accepted(1_000_000)),
        reply("reply-version", refused(RefusalCode::Version, "this side speaks 1")),
        reply("reply-malformed", refused(RefusalCode::Malformed, "a reserved field is not zero")),
        reply("reply-unknown", refused(RefusalCode::UnknownMigration, "there is no such migration here")),
        reply("reply-wrong-secret", refused(RefusalCode::WrongSecret, "the secret is wrong")),
        reply("reply-not-now", refused(RefusalCode::NotNow, "this data channel was given up")),
        reply("reply-declined", refused(RefusalCode::Declined, "no memory for 12 GiB")),
        reply("reply-untrusted", refused(RefusalCode::Untrusted, "hosts prove who they are here: schlüssel")),
    ]);
}

fn link(name: &'static str, header: LinkHeader) -> Recorded {
    recorded(
        name,
        move || header.encode().to_vec(),
        move |bytes| assert_eq!(LinkHeader::decode(bytes.try_into().unwrap()).unwrap(), header),
    )
}

fn message(name: &'static str, message: Message) -> Recorded {
    let written = message.clone();
    recorded(
        name,
        move || written.encode(),
        move |bytes| assert_eq!(Message::decode(bytes).unwrap(), message),
    )
}

fn setup() -> Setup {
    let region = |start, bytes| RamRegion { start: GuestAddress(start), bytes };
    Setup {
        name: "web-1".into(),
        guest: "kvm".into(),
        config: vec![1, 2, 3, 0, 255],
        layout: RamLayout::new(vec![region(0, 3 << 30), region(4 << 30, 1 << 30)]).unwrap(),
        touched_pages: 40_000,
        mode: "compression".into(),
        capabilities: vec!["zstd".into()],
    }
}

#[test]
fn control_messages() {
    let capabilities = vec!["zstd".to_owned(), "another".to_owned()];
    understands([
        link("link-message", LinkHeader { kind: LinkKind::Message, bytes: 1_114_112, number: 5 }),
        link("link-receipt", LinkHeader { kind: LinkKind::Receipt, bytes: 0, number: 1 << 40 }),
        link("link-goodbye", LinkHeader { kind: LinkKind::Goodbye, bytes: 0, number: 12 }),
        message("control-setup", Message::Setup(setup())),
        message("control-accept", Message::Accept(Accept { secret: SECRET.0, capabilities })),
        message("control-round-done", Message::RoundDone { round: RoundId(7), dirtied: 123_456 }),
        message("control-state", Message::State((0..=255).collect())),
        message(
            "control-finish",
            Message::Finish { state_bytes: 20_000, stopped_at: 1_700_000_000_123_456_789 },
        ),
        message("control-ready", Message::Ready(TOKEN)),
        message("control-commit", Message::Commit(TOKEN)),
        message("control-running", Message::Running(TOKEN)),
        message("control-query", Message::Query(TOKEN)),
        message("control-fenced", Message::Fenced(TOKEN)),
        message("control-abort", Message::Abort("the user wants it so".into())),
    ]);
}

/// The names of what a host can and demands, which a peer of another release reads.
#[test]
fn abilities() {
    let all = Capabilities::with_rdma(None);
    let demand = Encryption {
        required: true,
        isolated: vec!["10.0.0.1".parse().unwrap(), "fd00::7".parse().unwrap()],
    };
    let named = |name, capabilities: Capabilities| {
        let names = capabilities.names();
        let accept =
            move || Message::Accept(Accept { secret: SECRET.0, capabilities: names.clone() }).encode();
        recorded(name, accept, move |bytes| {
            let Message::Accept(accept) = Message::decode(bytes).unwrap() else { panic!("another message") };
            assert_eq!(
                Capabilities::from_names(&accept.capabilities),
                capabilities,
                "{:?}",
                accept.capabilities
            );
        })
    };
    understands([
        named("control-accept-rdma", all.clone()),
        named("control-accept-no-rdma", Capabilities::with_rdma(Some("this host has no RDMA device"))),
        named("control-accept-tls", all.clone().encrypting(true, &Encryption::default())),
        named("control-accept-encrypted", all.encrypting(true, &demand)),
    ]);
}

const fn run(start: u64, pages: u64) -> Run {
    Run { start: PageIndex(start), pages }
}

/// Page `n` of the test holds this.
fn page(number: u64) -> Vec<u8> {
    format!("page {number:3} ").bytes().cycle().take(4096).collect()
}

fn pages(name: &'static str, kind: FrameKind, runs: &'static [Run], sequence: u64) -> Recorded {
    let contents = || runs.iter().flat_map(|run| run.start.0..run.end()).flat_map(page).collect::<Vec<_>>();
    let payload = move || match kind {
        FrameKind::Raw => contents(),
        FrameKind::Zstd => zstd::bulk::compress(&contents(), 1).unwrap(),
        _ => Vec::new(),
    };
    let written = move || {
        let (payload, mut bytes) = (payload(), Vec::new());
        encode_pages(kind, RoundId(2), sequence, runs, payload.len() as u32, &mut bytes);
        bytes.extend(payload);
        bytes
    };
    recorded(name, written, move |bytes| {
        let (head, rest) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(head).unwrap();
        assert_eq!((header.kind, header.round, header.sequence), (kind, RoundId(2), sequence));
        let (table, payload) = rest.split_at(header.table_bytes());
        assert_eq!(payload.len(), header.payload_bytes as usize);
        let mut found = Vec::new();
        let total = header.decode_runs(table, &setup().layout, &mut found).unwrap();
        assert_eq!(found, runs);
        match kind {
            FrameKind::Raw => assert!(payload == contents()),
            FrameKind::Zstd => {
                let mut decompressor = Decompressor::new().unwrap();
                assert!(decompressor.decompress(payload, total).unwrap() == contents());
            }
            _ => {}
        }
    })
}

fn barrier(name: &'static str, fenced: &'static [ChannelId]) -> Recorded {
    recorded(
        name,
        move || encode_barrier(BarrierId(9), RoundId(2), 40, fenced),
        move |bytes| {
            let (head, table) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
            let header = Header::decode(head).unwrap();
            assert_eq!((header.kind, header.sequence), (FrameKind::Barrier(BarrierId(9)), 40));
            assert_eq!(header.decode_fenced(table), fenced);
        },
    )
}

fn receipt(name: &'static str, receipt: Receipt) -> Recorded {
    let written = receipt.clone();
    recorded(
        name,
        move || written.encode(),
        move |bytes| {
            let (head, text) = bytes.split_first_chunk().unwrap();
            let header = ReceiptHeader::decode(head).unwrap();
            assert_eq!(header.text_bytes(), text.len());
            assert_eq!(header.with_text(text), receipt);
        },
    )
}

#[test]
fn data_frames_and_receipts() {
    const SOME: &[Run] = &[run(5, 1), run(9, 2)];
    const MANY: &[Run] = &[run(0, 786_432), run(786_432, 4)];
    understands([
        pages("data-raw", FrameKind::Raw, SOME, 1),
        pages("data-zstd", FrameKind::Zstd, SOME, 2),
        pages("data-zero", FrameKind::Zero, MANY, 3),
        barrier("data-barrier", &[]),
        barrier("data-fence", &[ChannelId(0), ChannelId(700)]),
        written("data-written"),
        receipt("receipt-placed", Receipt::Placed(17)),
        receipt("receipt-barrier", Receipt::Barrier(BarrierId(9))),
        receipt("receipt-error", Receipt::Error("2 pages from page 8191 are outside".into())),
    ]);
}

fn written(name: &'static str) -> Recorded {
    recorded(
        name,
        || encode_written(300, RoundId(2), 41).to_vec(),
        |bytes| {
            let header = Header::decode(bytes.try_into().unwrap()).unwrap();
            assert_eq!((header.kind, header.round, header.sequence), (FrameKind::Written, RoundId(2), 41));
            assert_eq!((header.payload_bytes, header.entries), (300 * 4096, 0));
        },
    )
}

const PROGRAM: ProgramConfig = ProgramConfig {
    program: Program::Uniform,
    bytes_per_second: 64 << 20,
    touch_bytes: Some(24 << 20),
    seed: 0x0123_4567_89ab_cdef,
};

fn process_guest() -> ProcessGuest {
    ProcessGuest::new(ProcessConfig {
        bytes: 32 << 20,
        backing: Backing::Memfd,
        huge: HugePages::No,
        threads: 2,
        program: PROGRAM,
        fill: Fill::Half,
        tracker: pageferry::dirty::TrackerKind::Pagemap,
    })
    .unwrap()
}

/// The state of a guest that has run for a while, and is paused.
fn state_after_a_while(mut guest: impl SelfChecking) -> Vec<u8> {
    guest.resume().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    guest.pause().unwrap();
    println!("recorded: {:?}", guest.report());
    guest.save_state().unwrap()
}

#[test]
fn a_process_guest() {
    let config = recorded(
        "guest-process-config",
        || process_guest().config().unwrap(),
        |bytes| {
            let guest = ProcessGuest::skeleton(bytes, HugePages::No).unwrap();
            assert_eq!(guest.memory().layout(), &RamLayout::flat(32 << 20).unwrap());
            // A newer field may be added; what this one said is said again.
            assert_eq!(guest.config().unwrap(), process_guest().config().unwrap());
        },
    );
    let state = recorded(
        "guest-process-state",
        || state_after_a_while(process_guest()),
        |bytes| {
            let mut guest = process_guest();
            guest.load_state(bytes, Duration::from_secs(1)).unwrap();
            let SelfReport { heartbeats, writes, verified, corrupt, .. } = guest.report();
            assert_eq!((heartbeats, writes, verified, corrupt), (625, 16_567, 10_436, 0));
        },
    );
    understands([config, state]);
}

#[test]
fn a_journal() {
    let text = |name, content: &'static str| {
        let same = move |bytes: &[u8]| assert_eq!(bytes, content.as_bytes());
        bytes_of(&recorded(name, move || content.as_bytes().to_vec(), same))
    };
    let source = text(
        "journal-source",
        "state=committing\ntoken=17171717171717171717171717171717\npeer=10.0.1.2:7433 from 10.0.1.1 by eth1\n\
         peer=[fd00::2]:7434\npeer-name=beta\n",
    );
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
    put(&format!("source-{MIGRATION}"), &source);
    put(&format!("token-{TOKEN}"), &text("journal-running", "running\n"));
    put(&format!("token-{}", Token([1; 16])), &text("journal-fenced", "fenced\n"));
    let journal = Journal::open(directory.path()).unwrap();
    let unfinished = journal.unfinished().unwrap();
    assert_eq!((unfinished.len(), unfinished[0].migration, unfinished[0].token), (1, MIGRATION, TOKEN));
    let peers = &unfinished[0].peers;
    assert_eq!(peers.name.as_deref(), Some("beta"));
    let by_eth1 = session::Path {
        source: "10.0.1.1".parse().ok(),
        destination: "10.0.1.2:7433".parse().unwrap(),
        interface: "eth1".parse().ok(),
    };
    assert_eq!(peers.paths, [by_eth1, session::Path::to("[fd00::2]:7434".parse().unwrap())]);
    assert_eq!(journal.decision(TOKEN).unwrap(), Some(Decision::Running));
    assert_eq!(journal.decision(Token([1; 16])).unwrap(), Some(Decision::Fenced));
}

/// A range that a newer program speaks, which has moved the oldest along or not.
#[test]
fn versions_of_the_protocol_that_differ_agree_or_say_both() {
    let newer = Versions { oldest: 1, newest: 2 };
    assert_eq!((V1.common(newer), newer.common(V1)), (Some(1), Some(1)));
    let far = Versions { oldest: 2, newest: 3 };
    assert_eq!((V1.common(far), far.common(V1)), (None, None));

    let mut from_newer = Preamble::new(Purpose::NewMigration, MIGRATION, Secret::NONE);
    from_newer.versions = newer;
    assert_eq!(Preamble::decode(&from_newer.encode()).unwrap().versions, newer);
    from_newer.versions = far;
    let error = Preamble::decode(&from_newer.encode()).unwrap_err();
    assert!(matches!(error, PreambleError::Version { .. }));
    assert!(error.to_string().contains("version 2 to 3, this side speaks 1"), "{error}");

    // Also where everything behind the versions is another thing by then.
    let mut bytes = from_newer.encode();
    bytes[12..].fill(0xff);
    assert_eq!(Preamble::decode(&bytes).unwrap_err(), error);
    let mut reply =
        Reply { versions: far, ..Reply::refused(RefusalCode::Version, "you are too old") }.encode();
    reply[12] = 200;
    let (head, text) = reply.split_first_chunk().unwrap();
    let answered = ReplyHeader::decode(head).unwrap().with_text(text).unwrap_err();
    assert!(answered.to_string().contains("version 2 to 3, this side speaks 1"), "{answered}");
}

/// How a field is added: who does not know it skips it, and what was there keeps its meaning.
#[test]
fn fields_of_a_newer_version_are_skipped_and_its_messages_are_not() {
    let with = |message: Message, field: &[u8]| {
        // A message of one field: a key, a length below 128, the body. The field goes to the end of the body.
        let mut bytes = message.encode();
        assert!(bytes[1] < 100, "a short message");
        bytes[1] += field.len() as u8;
        bytes.extend(field);
        bytes
    };
    // Number 100 as a text, number 101 as a number.
    let field = [0xa2, 0x06, 3, b'n', b'e', b'w', 0xa8, 0x06, 42];
    for message in [Message::Ready(TOKEN), Message::RoundDone { round: RoundId(7), dirtied: 5 }] {
        assert_eq!(Message::decode(&with(message.clone(), &field)).unwrap(), message);
    }
    // Message number 60, which nobody has thought of yet.
    let error = Message::decode(&[0xe2, 0x03, 2, 8, 1]).unwrap_err();
    assert!(error.to_string().contains("the peer may be newer"), "{error}");
}

/// A guest of a newer program is refused before anything is made for it, and both versions are said.
#[test]
fn a_guest_of_a_newer_version_is_refused_with_both_named() {
    let mut config = process_guest().config().unwrap();
    // Its first field is the version.
    assert_eq!(config[..2], [0x08, 1]);
    config[1] = 2;
    let error = ProcessGuest::skeleton(&config, HugePages::No).unwrap_err().to_string();
    assert!(error.contains("version 2") && error.contains("only 1 is known here"), "{error}");
}

/// Nothing lies there that no test looks at.
#[test]
fn every_recorded_file_is_looked_at() {
    let source = [
        include_str!("main.rs"),
        include_str!("json.rs"),
        include_str!("kvm.rs"),
        include_str!("rdma.rs"),
        include_str!("relay.rs"),
    ]
    .concat();
    let mut found = 0;
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(source.contains(&format!("\"{name}\"")), "nobody looks at {name}");
        found += 1;
    }
    assert_eq!(found, 72, "no file is missing either");
}
