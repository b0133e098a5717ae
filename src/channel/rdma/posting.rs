//! The source's account of a queue pair: room in the send queue, credits, which requests are signalled. No I/O.
//!
//! Requests complete in the order in which they were posted, so a completion speaks for all before it. Each frame takes one
//! receive buffer of the destination, which is free again when the frame is confirmed: that is the credit.

/// A request in the middle of a frame is signalled when so many before it were not: often enough that a part of the queue is
/// free while the rest is under way.
const SIGNAL_EVERY: u64 = 32;

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

    /// The number of the next request, and whether it is signalled. The last of a frame and of each post is.
    pub(super) fn next_request(&mut self, last: bool) -> (u64, bool) {
        debug_assert!(self.room() > 0, "a request needs room in the queue");
        self.posted += 1;
        let signal = last || self.posted - self.signalled >= SIGNAL_EVERY;
        if signal {
            self.signalled = self.posted;
        }
        (self.posted, signal)
    }

    /// A request was done, and so were all before it.
    pub(super) fn completed(&mut self, request: u64) -> Result<(), Unknown> {
        if request > self.posted {
            return Err(Unknown);
        }
        self.completed = self.completed.max(request);
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
    use std::collections::VecDeque;

    proptest! {
        /// Against a queue that is kept request by request: it never overflows, never stands still, and no frame goes out without
        /// a buffer.
        #[test]
        fn the_queue_never_overflows_and_never_stalls(
            depth in 1..100u32, credits in 1..10u32, frames in prop::collection::vec(1..200u64, 1..30),
            whims in prop::collection::vec(any::<bool>(), 64),
        ) {
            let mut posting = Posting::new(depth, credits);
            let mut queue: VecDeque<(u64, bool)> = VecDeque::new();
            let (mut arrived, mut whim) = (VecDeque::new(), whims.iter().cycle());
            let complete = |posting: &mut Posting, queue: &mut VecDeque<(u64, bool)>, at_least_one: bool, whim: bool| {
                if !whim && !at_least_one {
                    return;
                }
                // The device does what is first in its queue, and tells only of what is signalled.
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
                let frame = posting.begin_frame();
                let mut left = requests;
                while left > 0 {
                    let post = left.min(u64::from(depth));
                    while posting.room() < post {
                        prop_assert!(queue.iter().any(|(_, signalled)| *signalled), "nothing will ever complete");
                        complete(&mut posting, &mut queue, true, true);
                    }
                    for index in 1..=post {
                        queue.push_back(posting.next_request(index == post));
                    }
                    prop_assert!(queue.len() <= depth as usize);
                    left -= post;
                    complete(&mut posting, &mut queue, false, *whim.next().unwrap());
                }
                arrived.push_back(frame);
                prop_assert!(arrived.len() <= credits as usize);
            }
        }
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
