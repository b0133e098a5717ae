//! A short run of every fuzz target: its seeds, what fuzzing has found on this machine, and mutations of both.
//!
//! The seeds in `fuzz/seeds` are valid messages of each kind, written by this test when `PAGEFERRY_WRITE_SEEDS` is set; it
//! fails when they no longer are what the encoders write.

#[path = "../fuzz/decoders.rs"]
mod decoders;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use decoders::{DECODERS, layout};
use pageferry::guest::qemu::multifd::{DEVICE_STATE_BYTES, INIT_BYTES, PACKET_BYTES};
use pageferry::units::{PAGE_SIZE, RoundId, Run};
use pageferry::wire::control::{Accept, Message, Setup, Token};
use pageferry::wire::data::{
    BarrierId, ChannelId, FrameKind, Receipt, encode_barrier, encode_pages, encode_written,
};
use pageferry::wire::link::{LinkHeader, LinkKind};
use pageferry::wire::preamble::{MigrationId, Preamble, Purpose, RefusalCode, Reply, Secret};
use pageferry::wire::rdma;
use pageferry::wire::relay::{Answer, Block, Offer, RelayMessage};

/// How many mutations each decoder gets.
const MUTATIONS: u64 = 10_000;
/// No input is longer: past the longest table a decoder looks at nothing more.
const MAX_INPUT_BYTES: usize = 32 << 10;

fn folder(kind: &str, decoder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind).join(decoder)
}

fn files(folder: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("a corpus file can be read")).collect()
}

#[test]
fn every_decoder_stands_its_corpus_and_mutations_of_it() {
    for (name, decode) in DECODERS {
        let corpus: Vec<Vec<u8>> =
            files(&folder("seeds", name)).into_iter().chain(files(&folder("corpus", name))).collect();
        assert!(!corpus.is_empty(), "{name} has no seeds");
        let run = |input: &[u8]| {
            assert!(catch_unwind(|| decode(input)).is_ok(), "{name} fails on {}", hex(input));
        };
        run(&[]);
        for input in &corpus {
            run(input);
            // Every truncation of the part that is looked at first.
            (0..input.len().min(256)).for_each(|length| run(&input[..length]));
        }
        for seed in 0..MUTATIONS {
            run(&mutated(&corpus, seed));
        }
    }
}

/// The decoders do look: each accepts its seeds, so that a mutation starts from something that is understood.
#[test]
fn the_seeds_are_what_the_encoders_write() {
    let write = std::env::var_os("PAGEFERRY_WRITE_SEEDS").is_some();
    for (decoder, _) in DECODERS {
        let expected: Vec<(String, Vec<u8>)> = seeds()
            .into_iter()
            .filter(|(owner, ..)| *owner == decoder)
            .map(|(_, name, bytes)| (name.to_owned(), bytes))
            .collect();
        assert!(!expected.is_empty(), "{decoder} has seeds");
        let folder = folder("seeds", decoder);
        if write {
            fs::create_dir_all(&folder).expect("the folder of seeds can be made");
        }
        for (name, bytes) in &expected {
            if write {
                fs::write(folder.join(name), bytes).expect("a seed can be written");
            }
            let found = fs::read(folder.join(name)).ok();
            assert_eq!(
                found.as_ref(),
                Some(bytes),
                "fuzz/seeds/{decoder}/{name}: see CONTRIBUTING.md, Decoders"
            );
        }
        assert_eq!(files(&folder).len(), expected.len(), "{decoder} has only seeds that are known");
    }
}

#[test]
fn a_decoder_that_panics_is_seen() {
    let run = |input: &'static [u8]| catch_unwind(|| assert!(input.len() < 2)).is_ok();
    assert!(run(b"a") && !run(b"ab"));
    let corpus = vec![vec![0; 64]];
    let differing = (0..100).filter(|&seed| mutated(&corpus, seed) != corpus[0]).count();
    assert!(differing > 90, "{differing} of 100 mutations differ from their seed");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Decoder, name and bytes of each seed.
fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (migration, secret) = (MigrationId([7; 16]), Secret([9; 32]));
    let preamble = |purpose| Preamble::new(purpose, migration, secret).encode().to_vec();
    let pages = |kind, runs: &[Run], payload_bytes| {
        let mut bytes = Vec::new();
        encode_pages(kind, RoundId(3), 17, runs, payload_bytes, &mut bytes);
        bytes
    };
    let page = PAGE_SIZE as u32;
    let link = |kind, bytes| LinkHeader { kind, bytes, number: 5 }.encode().to_vec();
    let end = rdma::End { queue_pair: 17, packet: 0x00ab_cdef, mtu: 4096, gid: [0xfe; 16] };
    let token = Token([3; 16]);
    let mut seeds = vec![
        ("preamble", "new", preamble(Purpose::NewMigration)),
        ("preamble", "resume", preamble(Purpose::ResumeControl { attempt: 1, received: 4 })),
        ("preamble", "data", preamble(Purpose::Data { channel: 2 })),
        ("preamble", "query", preamble(Purpose::Query)),
        ("preamble", "rdma", preamble(Purpose::RdmaData { channel: 2 })),
        ("reply", "accepted", Reply::accepted(6).encode()),
        ("reply", "refused", Reply::refused(RefusalCode::Declined, "no memory is left").encode()),
        ("frame", "raw", pages(FrameKind::Raw, &[Run::new(0, 1), Run::new(200, 3)], 4 * page)),
        ("frame", "zstd", pages(FrameKind::Zstd, &[Run::new(160, 8)], page + 100)),
        ("frame", "zero", pages(FrameKind::Zero, &[Run::new(0, 160), Run::new(160, 16_384)], 0)),
        ("frame", "barrier", encode_barrier(BarrierId(8), RoundId(3), 18, &[])),
        ("frame", "fence", encode_barrier(BarrierId(9), RoundId(3), 19, &[ChannelId(0), ChannelId(4)])),
        ("frame", "written", encode_written(200, RoundId(3), 20).to_vec()),
        ("receipt", "placed", Receipt::Placed(17).encode()),
        ("receipt", "barrier", Receipt::Barrier(BarrierId(8)).encode()),
        ("receipt", "error", Receipt::Error("a run outside the guest".to_owned()).encode()),
        (
            "rdma_opening",
            "offer",
            rdma::Offer { end, frames: 64, piece_bytes: 2 << 20, map: vec![3, 0, 1] }.encode(),
        ),
        ("rdma_opening", "taken", rdma::Answer::Taken { end, frames: 32 }.encode()),
        (
            "rdma_opening",
            "refused",
            rdma::Answer::Refused("this host has no RDMA device".to_owned()).encode(),
        ),
        ("rdma_talk", "want", rdma::Want(7).encode().to_vec()),
        ("rdma_talk", "key", rdma::FromDestination::Key { piece: 7, key: 0x1234, address: 1 << 40 }.encode()),
        (
            "rdma_talk",
            "no_key",
            rdma::FromDestination::NoKey { piece: 7, text: "no memory".to_owned() }.encode(),
        ),
        ("link", "message", link(LinkKind::Message, 100)),
        ("link", "receipt", link(LinkKind::Receipt, 0)),
        ("link", "goodbye", link(LinkKind::Goodbye, 0)),
    ];
    let setup = Setup {
        name: "web-1".to_owned(),
        guest: "kvm".to_owned(),
        config: vec![1, 2, 3, 4],
        layout: layout(),
        touched_pages: 100,
        mode: "auto".to_owned(),
        capabilities: vec!["zstd".to_owned()],
    };
    let messages = [
        ("setup", Message::Setup(setup)),
        ("accept", Message::Accept(Accept { secret: [9; 32], capabilities: vec!["zstd".to_owned()] })),
        ("round_done", Message::RoundDone { round: RoundId(1), dirtied: 500 }),
        ("state", Message::State(vec![1, 2, 3, 0, 255])),
        ("finish", Message::Finish { state_bytes: 5, stopped_at: 1_700_000_000_000_000_000 }),
        ("ready", Message::Ready(token)),
        ("commit", Message::Commit(token)),
        ("running", Message::Running(token)),
        ("query", Message::Query(token)),
        ("fenced", Message::Fenced(token)),
        ("abort", Message::Abort("the user wants it so".to_owned())),
    ];
    seeds.extend(messages.map(|(name, message)| ("control", name, message.encode())));
    seeds.extend(relay_messages().map(|(name, message)| ("relay", name, message.encode())));
    seeds.extend(multifd_seeds().map(|(name, bytes)| ("multifd", name, bytes)));
    for (decoder, name, bytes) in &seeds {
        if *decoder == "control" {
            assert!(Message::decode(bytes).is_ok(), "{name} is a message");
        }
    }
    seeds
}

fn relay_messages() -> [(&'static str, RelayMessage); 12] {
    let block = |name: &str, bytes| Block { name: name.to_owned(), bytes, backend: true, shared: true };
    let offer = Offer {
        hypervisor: "QEMU 10.0.2".to_owned(),
        blocks: vec![block("ram0", 256 << 20), block("pc.bios", 256 << 10)],
        channels: 2,
        return_path: true,
        tls: false,
        placement: true,
        staging_bytes: 64 << 20,
        mode: "compression".to_owned(),
        capabilities: vec!["zstd".to_owned()],
    };
    let answer = Answer {
        secret: [9; 32],
        hypervisor: "QEMU 10.0.2".to_owned(),
        placed: vec![0],
        because: "is private".to_owned(),
        capabilities: vec!["zstd".to_owned()],
    };
    [
        ("offer", RelayMessage::Offer(offer)),
        ("answer", RelayMessage::Answer(answer)),
        ("bytes", RelayMessage::Bytes { stream: 1, bytes: b"QEVM".to_vec() }),
        ("end", RelayMessage::End { stream: 2 }),
        ("packet", RelayMessage::Packet { stream: 1, header: vec![1; 64], page: 128, bytes: 4096 }),
        ("passed", RelayMessage::Passed { stream: 0, bytes: 65_536 }),
        ("free", RelayMessage::Free { page: 128 }),
        ("loaded", RelayMessage::Loaded),
        ("commit", RelayMessage::Commit { run: true }),
        ("running", RelayMessage::Running),
        ("fenced", RelayMessage::Fenced("its disks are locked".to_owned())),
        ("abort", RelayMessage::Abort("the user wants it so".to_owned())),
    ]
}

/// The beginning of a channel, a packet of three pages and a zero page, and a device's state.
fn multifd_seeds() -> [(&'static str, Vec<u8>); 3] {
    let begin = |bytes: usize, flags: u32| {
        let mut begun = vec![0; bytes];
        begun[..4].copy_from_slice(&0x1122_3344u32.to_be_bytes());
        begun[7] = 1;
        begun[8..12].copy_from_slice(&flags.to_be_bytes());
        begun
    };
    let (mut pages, mut state) = (begin(PACKET_BYTES, 1), begin(DEVICE_STATE_BYTES, 64));
    for (at, number) in [(12, 128), (16, 3), (20, 3 * 4096), (32, 1u32)] {
        pages[at..at + 4].copy_from_slice(&number.to_be_bytes());
    }
    pages[64..68].copy_from_slice(b"ram0");
    for (index, offset) in [0, 0x1000, 0x8000, 0x9000u64].into_iter().enumerate() {
        pages[320 + index * 8..328 + index * 8].copy_from_slice(&offset.to_be_bytes());
    }
    state[DEVICE_STATE_BYTES - 3] = 1;
    [("init", begin(INIT_BYTES, 0)), ("pages", pages), ("state", state)]
}

/// One of the corpus with one to eight changes, the same for the same seed.
fn mutated(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        change(&mut bytes, corpus, &mut random);
    }
    bytes.truncate(MAX_INPUT_BYTES);
    bytes
}

fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    /// Lengths and numbers that bounds are wrong by.
    const EDGES: [u64; 10] = [0, 1, 0x7f, 0xff, 0x400, 0x401, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];
    let at = random.below(bytes.len().max(1));
    match random.below(7) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => bytes.extend((0..random.below(32)).map(|_| random.next() as u8)),
        4 => {
            let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
            let width = [1, 2, 4, 8][random.below(4)];
            let end = (at + width).min(bytes.len());
            bytes[at.min(end)..end].copy_from_slice(&edge[..end - at.min(end)]);
        }
        5 => {
            let other = &corpus[random.below(corpus.len())];
            let from = random.below(other.len().max(1)).min(other.len());
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        _ => bytes.insert(at.min(bytes.len()), random.next() as u8),
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): every seed, 0 too, gives a good sequence.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
