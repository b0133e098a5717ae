//! What runs in a host with soft-RoCE, from its device to itself.

use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::session::rdma::MemoryLock;
use pageferry::sys::mapping::{HugePages, Mapping};
use pageferry::sys::verbs::{
    Access, AsyncEvent, Completion, CompletionQueue, Context, Depths, GidKind, ProtectionDomain, QueuePair,
    QueuePairState, ReceiveBatch, Remote, Residence, Retries, SendBatch, SendOperation, Status, VerbsError,
    Work, devices,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const MEMORY: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// 4.096 us times 2^14 and six retries: half a second until a peer counts as lost.
const RETRIES: Retries = Retries { timeout: 14, retries: 6, not_ready_retries: 6, not_ready_timer: 12 };

/// Two connected queue pairs of one device, the first of which pushes.
struct Pair {
    domain: Arc<ProtectionDomain>,
    sent: Arc<CompletionQueue>,
    received: Arc<CompletionQueue>,
    source: QueuePair,
    destination: QueuePair,
}

fn open() -> Arc<Context> {
    let devices = devices().expect("a list of devices");
    let device =
        devices.iter().find(|device| device.name() == "rxe0").expect("rxe0, as the testbed makes it");
    device.open().expect("rxe0 opens")
}

fn pair(context: &Arc<Context>) -> Pair {
    let domain = ProtectionDomain::new(context).expect("a domain");
    let sent = CompletionQueue::new(context, 64).expect("a queue");
    let received = CompletionQueue::new(context, 64).expect("a queue");
    let depths = Depths { send: 32, receive: 8, segments: 4 };
    let source = QueuePair::new(&domain, &sent, &received, depths).expect("a queue pair");
    let destination = QueuePair::new(&domain, &sent, &received, depths).expect("a queue pair");
    let gids = context.gids().expect("addresses");
    let gid = gids
        .iter()
        .find(|gid| gid.kind == GidKind::RoceV2 && gid.gid[10..12] == [0xff; 2])
        .expect("an IPv4 one");
    for (own, peer) in [(&source, &destination), (&destination, &source)] {
        let remote = Remote {
            queue_pair: peer.number(),
            packet: 77,
            gid: gid.gid,
            local_gid_index: u8::try_from(gid.index).expect("a small index"),
            mtu: context.port(1).expect("a port").active_mtu,
            traffic_class: 0,
        };
        own.initialise(1, true).expect("initialised");
        own.ready_to_receive(1, &remote, &RETRIES).expect("ready to receive");
        own.ready_to_send(77, &RETRIES).expect("ready to send");
    }
    assert_eq!(source.state().expect("a state"), QueuePairState::ReadyToSend);
    Pair { domain, sent, received, source, destination }
}

fn memory() -> Arc<[Mapping]> {
    [Mapping::anonymous(MEMORY, HugePages::No).expect("memory")].into()
}

/// Waits for so many completions by events, never by spinning.
fn completions(queue: &CompletionQueue, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut found = Vec::new();
    while found.len() < count {
        assert!(Instant::now() < deadline, "{count} completions are awaited, and these came: {found:?}");
        queue.arm().expect("armed");
        if queue.poll(64, &mut found).expect("completions") == 0 {
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            poll(&mut [PollFd::new(&queue.as_fd(), PollFlags::IN)], Some(&second)).expect("poll(2)");
            queue.take_event().expect("events");
        }
    }
    found
}

#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn writes_arrive_where_they_are_sent_and_announce_themselves() {
    let context = open();
    let pair = pair(&context);
    let from = memory();
    let to: Arc<[Mapping]> = [Mapping::memfd("destination", MEMORY, HugePages::No).expect("memory")].into();
    for word in 0..MEMORY / 8 {
        from[0].store(word * 8, word + 1);
    }
    let local =
        pair.domain.register(&from, 0, 0, MEMORY, Access::LocalRead, Residence::Locked).expect("registered");
    let remote = pair
        .domain
        .register(&to, 0, PAGE, MEMORY - PAGE, Access::RemoteWrite, Residence::Locked)
        .expect("registered");
    assert_eq!(remote.address(), to[0].address() + PAGE);

    let mut buffers = ReceiveBatch::new();
    buffers.push(900, None);
    pair.destination.post_receive(&mut buffers).expect("posted");
    let segment = |page: u64| local.segment(page * PAGE, PAGE as u32).expect("inside");
    let place = |page: u64, immediate| SendOperation::Write {
        address: remote.address() + page * PAGE,
        key: remote.remote_key(),
        immediate,
    };
    // Pages 7 and 3 behind each other at 10 and 11, page 5 at 20, and the announcement of the whole.
    let mut batch = SendBatch::new();
    batch.push(1, place(10, None), &[segment(7), segment(3)], false);
    batch.push(2, place(20, None), &[segment(5)], false);
    batch.push(3, place(0, Some(0x0102_0304)), &[], true);
    assert_eq!(batch.len(), 3);
    pair.source.post_send(&mut batch).expect("posted");

    let [done] = completions(&pair.sent, 1)[..] else { panic!("only the last one is signalled") };
    assert_eq!((done.id, done.status, done.queue_pair), (3, Status::SUCCESS, pair.source.number()));
    let [told] = completions(&pair.received, 1)[..] else { panic!("one announcement") };
    assert_eq!((told.id, told.status, told.work), (900, Status::SUCCESS, Work::ReceiveWrite));
    assert_eq!((told.immediate, told.queue_pair), (Some(0x0102_0304), pair.destination.number()));
    for (page, expected) in [(10, Some(7)), (11, Some(3)), (20, Some(5)), (9, None), (12, None), (21, None)] {
        for word in (0..PAGE).step_by(8) {
            // The region begins at the mapping's second page.
            let got = to[0].load((page + 1) * PAGE + word);
            let expected = expected.map_or(0, |from: u64| (from * PAGE + word) / 8 + 1);
            assert_eq!(got, expected, "page {page} at {word}");
        }
    }
}

#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn messages_arrive_in_the_buffers_that_wait_for_them() {
    let context = open();
    let pair = pair(&context);
    let memory = memory();
    memory[0].store(0, 0x1122_3344_5566_7788);
    let region = pair
        .domain
        .register(&memory, 0, 0, MEMORY, Access::LocalWrite, Residence::Locked)
        .expect("registered");
    let mut buffers = ReceiveBatch::new();
    for id in 0..2 {
        let segment = region.segment((id + 1) * PAGE, PAGE as u32).expect("inside");
        buffers.push(id, Some(segment));
    }
    pair.destination.post_receive(&mut buffers).expect("posted");
    let mut batch = SendBatch::new();
    let message = region.segment(0, 24).expect("inside");
    batch.push(5, SendOperation::Send { immediate: None }, &[message], true);
    batch.push(6, SendOperation::Send { immediate: Some(9) }, &[message], true);
    pair.source.post_send(&mut batch).expect("posted");
    let sent = completions(&pair.sent, 2);
    assert!(sent.iter().all(|done| done.status == Status::SUCCESS && done.work == Work::Send), "{sent:?}");
    let received = completions(&pair.received, 2);
    let seen: Vec<_> = received.iter().map(|done| (done.id, done.bytes, done.immediate)).collect();
    assert_eq!(seen, [(0, 24, None), (1, 24, Some(9))]);
    assert_eq!(
        (memory[0].load(PAGE), memory[0].load(2 * PAGE)),
        (0x1122_3344_5566_7788, 0x1122_3344_5566_7788)
    );
}

#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn what_the_destination_did_not_allow_is_refused_and_flushes_the_rest() {
    let context = open();
    let memory = memory();
    let too_much = ProtectionDomain::new(&context).expect("a domain").register(
        &memory,
        0,
        PAGE,
        MEMORY,
        Access::LocalRead,
    );
    assert!(matches!(too_much, Err(VerbsError::OutOfRange { .. })), "{too_much:?}");
    // A key that was never given, an address past the end, and memory that may only be read.
    for case in ["key", "address", "access"] {
        let pair = pair(&context);
        let local = pair
            .domain
            .register(&memory, 0, 0, PAGE, Access::LocalRead, Residence::Locked)
            .expect("registered");
        let access = if case == "access" { Access::LocalWrite } else { Access::RemoteWrite };
        let remote =
            pair.domain.register(&memory, 0, PAGE, PAGE, access, Residence::Locked).expect("registered");
        let outside = local.segment(8, PAGE as u32);
        assert!(matches!(outside, Err(VerbsError::OutOfRange { .. })), "{outside:?}");
        let mut batch = SendBatch::new();
        let write = SendOperation::Write {
            address: remote.address() + if case == "address" { 8 } else { 0 },
            key: if case == "key" { remote.remote_key() ^ 0xff00 } else { remote.remote_key() },
            immediate: None,
        };
        let page = local.segment(0, PAGE as u32).expect("inside");
        batch.push(1, write, &[page], true);
        batch.push(2, write, &[page], true);
        pair.source.post_send(&mut batch).expect("posted");
        let done = completions(&pair.sent, 2);
        let seen: Vec<_> = done.iter().map(|done| (done.id, done.status)).collect();
        assert_eq!(seen, [(1, Status::REMOTE_ACCESS), (2, Status::FLUSHED)], "{case}");
        assert_eq!(pair.source.state().expect("a state"), QueuePairState::Error, "{case}");
    }
}

/// Run as nobody, with a limit of 64 KiB.
#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn memory_that_may_not_be_locked_is_named_with_its_size() {
    let domain = ProtectionDomain::new(&open()).expect("a domain");
    let memory = memory();
    let error = domain
        .register(&memory, 0, 0, MEMORY, Access::RemoteWrite, Residence::Locked)
        .expect_err("more than the limit");
    assert!(error.to_string().contains("ulimit -l 1024"), "{error}");
    let limit = MemoryLock::of_this_process();
    assert_eq!(limit.limit_bytes, Some(64 << 10));
    assert_eq!(limit.reason_against(MEMORY).map(|reason| reason.code()), Some("memlock-too-small"));
    domain
        .register(&memory, 0, 0, PAGE, Access::RemoteWrite, Residence::Locked)
        .expect("less than the limit");
}

#[test]
#[ignore = "runs in a host of scripts/rxe-testbed"]
fn a_port_that_goes_down_and_comes_back_is_told() {
    let context = open();
    let await_event = |wanted: AsyncEvent| {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut seen = Vec::new();
        while !seen.contains(&wanted) {
            assert!(Instant::now() < deadline, "{wanted:?} is awaited, and these came: {seen:?}");
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            poll(&mut [PollFd::new(&context.as_fd(), PollFlags::IN)], Some(&second)).expect("poll(2)");
            seen.extend(context.next_event().expect("events"));
        }
    };
    let set = |state: &str| {
        let status = Command::new("ip").args(["link", "set", "pf0-end", state]).status().expect("ip starts");
        assert!(status.success());
    };
    set("down");
    await_event(AsyncEvent::PortError(1));
    set("up");
    await_event(AsyncEvent::PortActive(1));
}
