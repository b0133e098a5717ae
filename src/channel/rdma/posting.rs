//! The source's account of a queue pair: room in the send queue, credits, which requests are signalled. No I/O.
//!
//! Requests complete in the order in which they were posted, so a completion speaks for all before it. Each frame takes one
//! receive buffer of the destination, which is free again when the frame is confirmed: that is the credit.

use std::collections::VecDeque;

/// A request is signalled when it is the last of so many that were not: each completion wakes a thread.
const SIGNAL_EVERY: u64 = 32;
/// Or of so many bytes.
const SIGNAL_BYTES: u64 = 512 << 10;
/// Bytes that may be under way at once: 80 us of a wire of 400 Gbit/s. A queue pair would take far more, but what one has taken no
/// other one can send, and at the end of a round the slowest is waited for.
const MOST_BYTES: u64 = 4 << 20;

/// What is under way.
#[derive(Debug)]
pub(super) struct Posting {
    /// Requests that the send queue holds.
    depth: u64,
    /// Frames that the destination has room for.
    credits: u64,
    posted: u64,
    completed: u64,
    signalled: u64,
    /// Bytes of requests that were posted since then.
    unsignalled_bytes: u64,
    /// Signalled requests, and the bytes that were posted since the one before.
    under_way: VecDeque<(u64, u64)>,
    /// The sum of those.
    bytes: u64,
    sent: u64,
    confirmed: u64,
    /// The last barrier, and the number of its frame.
    barrier: (u64, u64),
}

/// A completion or a confirmation of what was never under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unknown;

impl Posting {
    /// An empty queue.
    pub(super) fn new(depth: u32, credits: u32) -> Self {
        Self {
            depth: u64::from(depth),
            credits: u64::from(credits),
            posted: 0,
            completed: 0,
            signalled: 0,
            unsignalled_bytes: 0,
            under_way: VecDeque::new(),
            bytes: 0,
            sent: 0,
            confirmed: 0,
            barrier: (0, 0),
        }
    }

    /// Requests that the queue takes now.
    pub(super) fn room(&self) -> u64 {
        self.depth - (self.posted - self.completed)
    }

    /// Whether the destination has a buffer for one more frame.
    pub(super) fn has_credit(&self) -> bool {
        self.sent - self.confirmed < self.credits
    }

    /// The number of the next frame, and from now on the last one that was sent. Takes a credit.
    pub(super) fn begin_frame(&mut self) -> u64 {
        debug_assert!(self.has_credit(), "a frame needs a buffer at the destination");
        self.sent += 1;
        self.sent
    }

    /// The next frame is this barrier.
    pub(super) fn begin_barrier(&mut self, barrier: u64) -> u64 {
        let frame = self.begin_frame();
        self.barrier = (barrier, frame);
        frame
    }

    /// The frame that was sent last.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Requests that may be posted together. Fewer than the queue holds, since some before them may not have been signalled.
    pub(super) fn at_once(&self) -> u64 {
        (self.depth / 2).max(1)
    }

    /// Whether so many more bytes may be on their way. They may when nothing is under way that will complete: what was not
    /// signalled does not, until something behind it is.
    pub(super) fn has_room_for(&self, bytes: u64) -> bool {
        self.bytes == 0 || self.bytes + self.unsignalled_bytes + bytes <= MOST_BYTES
    }

    /// The number of the next request, which sends so many bytes, and whether it is signalled, as it can be told to be.
    pub(super) fn next_request(&mut self, bytes: u64, signal: bool) -> (u64, bool) {
        debug_assert!(self.room() > 0, "a request needs room in the queue");
        self.posted += 1;
        self.unsignalled_bytes += bytes;
        let every = SIGNAL_EVERY.min(self.at_once());
        let signal =
            signal || self.posted - self.signalled >= every || self.unsignalled_bytes >= SIGNAL_BYTES;
        if signal {
            self.signalled = self.posted;
            self.bytes += self.unsignalled_bytes;
            self.under_way.push_back((self.posted, std::mem::take(&mut self.unsignalled_bytes)));
        }
        (self.posted, signal)
    }

    /// A request was done, and so were all before it.
    pub(super) fn completed(&mut self, request: u64) -> Result<(), Unknown> {
        if request > self.posted {
            return Err(Unknown);
        }
        self.completed = self.completed.max(request);
        while let Some((_, bytes)) = self.under_way.front().filter(|(last, _)| *last <= request) {
            self.bytes -= bytes;
            self.under_way.pop_front();
        }
        Ok(())
    }

    /// The destination has every frame up to this one.
    pub(super) fn confirmed(&mut self, frame: u64) -> Result<(), Unknown> {
        if frame > self.sent {
            return Err(Unknown);
        }
        self.confirmed = self.confirmed.max(frame);
        Ok(())
    }

    /// The destination has reached a barrier, and so has every frame before it.
    pub(super) fn reached(&mut self, barrier: u64) {
        if self.barrier.0 == barrier {
            self.confirmed = self.confirmed.max(self.barrier.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a queue that is kept request by request: it never overflows, never stands still, and no frame goes out without
        /// a buffer.
        #[test]
        fn the_queue_never_overflows_and_never_stalls(
            depth in 1..100u32, credits in 1..10u32, request_bytes in 0..(2 * MOST_BYTES),
            frames in prop::collection::vec(1..200u64, 1..30), whims in prop::collection::vec(any::<bool>(), 64),
        ) {
            let mut posting = Posting::new(depth, credits);
            let mut queue: VecDeque<(u64, bool)> = VecDeque::new();
            let (mut arrived, mut whim) = (VecDeque::new(), whims.iter().cycle());
            // The device does what is first in its queue, and tells only of what is signalled.
            let complete = |posting: &mut Posting, queue: &mut VecDeque<(u64, bool)>| {
                while let Some((request, signalled)) = queue.pop_front() {
                    if signalled {
                        posting.completed(request).unwrap();
                        break;
                    }
                }
            };
            for requests in frames {
                while !posting.has_credit() {
                    prop_assert_eq!(arrived.len() as u32, credits);
                    let frame: u64 = arrived.pop_front().unwrap();
                    posting.confirmed(frame).unwrap();
                }
                while !posting.has_room_for(request_bytes) {
                    prop_assert!(queue.iter().any(|(_, signalled)| *signalled), "nothing will ever complete");
                    complete(&mut posting, &mut queue);
                }
                let frame = posting.begin_frame();
                let mut left = requests;
                while left > 0 {
                    let post = left.min(posting.at_once());
                    while posting.room() < post {
                        prop_assert!(queue.iter().any(|(_, signalled)| *signalled), "nothing will ever complete");
                        complete(&mut posting, &mut queue);
                    }
                    for _ in 0..post {
                        queue.push_back(posting.next_request(request_bytes, *whim.next().unwrap()));
                    }
                    prop_assert!(queue.len() <= depth as usize);
                    left -= post;
                    if *whim.next().unwrap() {
                        complete(&mut posting, &mut queue);
                    }
                }
                arrived.push_back(frame);
                prop_assert!(arrived.len() <= credits as usize);
            }
            // A barrier is signalled: once that has completed, nothing counts as under way.
            while posting.room() == 0 {
                complete(&mut posting, &mut queue);
            }
            let (last, signalled) = posting.next_request(request_bytes, true);
            prop_assert!(signalled);
            posting.completed(last).unwrap();
            prop_assert_eq!((posting.bytes, posting.unsignalled_bytes, posting.under_way.len()), (0, 0, 0));
        }
    }

    #[test]
    fn what_is_under_way_is_bounded_and_told_of_now_and_then() {
        const FRAME: u64 = 64 << 10;
        let mut posting = Posting::new(512, 64);
        let mut signalled = Vec::new();
        while posting.has_room_for(FRAME) {
            let (request, signal) = posting.next_request(FRAME, false);
            signalled.extend(signal.then_some(request));
        }
        assert_eq!(posting.posted, MOST_BYTES / FRAME);
        assert_eq!(signalled, (1..=8).map(|which| which * 8).collect::<Vec<_>>());
        posting.completed(signalled[0]).unwrap();
        assert!(posting.has_room_for(8 * FRAME) && !posting.has_room_for(9 * FRAME));
        // However much it is, it goes when nothing else is under way.
        posting.completed(signalled[7]).unwrap();
        assert!(posting.has_room_for(2 * MOST_BYTES));
    }

    #[test]
    fn a_barrier_gives_back_the_credits_of_all_before_it() {
        let mut posting = Posting::new(8, 3);
        posting.begin_frame();
        posting.begin_frame();
        posting.begin_barrier(7);
        assert!(!posting.has_credit());
        posting.reached(6);
        assert!(!posting.has_credit(), "another barrier");
        posting.reached(7);
        assert!(posting.has_credit());
        assert_eq!(posting.confirmed(4), Err(Unknown));
        assert_eq!(posting.completed(1), Err(Unknown));
    }
}
