//! What a control link owes and has: numbers, receipts and what to send again. No I/O, no clock.
//!
//! Messages are numbered from 0 in each direction and kept until the peer has confirmed them. A new connection begins with
//! both sides saying how many messages they have, and goes on from there. A message that comes twice is dropped; one that is
//! missing cannot be, on a connection that keeps the order, and ends the link.
//!
//! Per connection: [`ControlState::connected`], then [`ControlState::next`] until it has nothing, again after each other call;
//! [`ControlState::message`] and [`ControlState::receipt`] for what comes.

use std::collections::VecDeque;
use std::sync::Arc;

/// A peer whose numbers cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CountError {
    /// A message was left out.
    #[error("message {got} came where {expected} was due")]
    Gap {
        /// Its number.
        got: u64,
        /// The number that was due.
        expected: u64,
    },
    /// The peer has what was never sent, or forgot what it had confirmed.
    #[error("the peer says that it has {got} messages; it can have {least} to {most}")]
    Receipt {
        /// What it says.
        got: u64,
        /// What it confirmed before.
        least: u64,
        /// What was sent.
        most: u64,
    },
}

/// What to send next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// A message.
    Message {
        /// Its number.
        number: u64,
        /// Its content.
        bytes: Arc<[u8]>,
    },
    /// How many messages have come.
    Receipt(u64),
}

/// One side of a control link.
#[derive(Clone, Debug, Default)]
pub struct ControlState {
    /// Messages that the peer has not confirmed; the first has number `confirmed`.
    outbox: VecDeque<Arc<[u8]>>,
    confirmed: u64,
    /// The number of the next message to send on this connection.
    next: u64,
    received: u64,
    receipt_due: bool,
}

impl ControlState {
    /// A message to send. It is kept until the peer has confirmed it.
    pub fn queue(&mut self, message: Vec<u8>) {
        self.outbox.push_back(message.into());
    }

    /// How many messages have come: what the peer is told when a connection begins.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the peer has confirmed every message.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// A connection begins, and the peer says that it has `peer_received` messages.
    ///
    /// # Errors
    /// [`CountError::Receipt`].
    pub fn connected(&mut self, peer_received: u64) -> Result<(), CountError> {
        // What an earlier connection sent may have arrived without a receipt, so everything queued may be there.
        self.next = self.confirmed + self.outbox.len() as u64;
        self.receipt(peer_received)?;
        self.next = peer_received;
        Ok(())
    }

    /// Makes a receipt due, as a sign of life.
    pub fn heartbeat(&mut self) {
        self.receipt_due = true;
    }

    /// What to send next on this connection, if anything.
    pub fn next(&mut self) -> Option<Outgoing> {
        if std::mem::take(&mut self.receipt_due) {
            return Some(Outgoing::Receipt(self.received));
        }
        let bytes = self.outbox.get((self.next - self.confirmed) as usize)?.clone();
        self.next += 1;
        Some(Outgoing::Message { number: self.next - 1, bytes })
    }

    /// Message `number` came; whether it is new.
    ///
    /// # Errors
    /// [`CountError::Gap`].
    pub fn message(&mut self, number: u64) -> Result<bool, CountError> {
        if number > self.received {
            return Err(CountError::Gap { got: number, expected: self.received });
        }
        self.receipt_due = true;
        let new = number == self.received;
        self.received += u64::from(new);
        Ok(new)
    }

    /// The peer has `count` messages.
    ///
    /// # Errors
    /// [`CountError::Receipt`].
    pub fn receipt(&mut self, count: u64) -> Result<(), CountError> {
        if !(self.confirmed..=self.next).contains(&count) {
            return Err(CountError::Receipt { got: count, least: self.confirmed, most: self.next });
        }
        self.outbox.drain(..(count - self.confirmed) as usize);
        self.confirmed = count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Queue(usize),
        Send(usize),
        Deliver(usize),
        Heartbeat(usize),
        /// The connection breaks; what is under way is lost. A new one begins.
        Cut,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..2usize).prop_map(Step::Queue),
            6 => (0..2usize).prop_map(Step::Send),
            6 => (0..2usize).prop_map(Step::Deliver),
            1 => (0..2usize).prop_map(Step::Heartbeat),
            1 => Just(Step::Cut),
        ]
    }

    #[derive(Default)]
    struct Side {
        state: ControlState,
        queued: u64,
        heard: Vec<u64>,
        /// What is under way to this side.
        wire: VecDeque<Outgoing>,
    }

    fn deliver(side: &mut Side) -> bool {
        let Some(frame) = side.wire.pop_front() else { return false };
        match frame {
            Outgoing::Message { number, bytes } => {
                if side.state.message(number).unwrap() {
                    side.heard.push(u64::from_le_bytes(bytes[..].try_into().unwrap()));
                }
            }
            Outgoing::Receipt(count) => side.state.receipt(count).unwrap(),
        }
        true
    }

    fn send(sides: &mut [Side; 2], from: usize) -> bool {
        let Some(frame) = sides[from].state.next() else { return false };
        sides[1 - from].wire.push_back(frame);
        true
    }

    fn cut(sides: &mut [Side; 2]) {
        let received = [sides[0].state.received(), sides[1].state.received()];
        for (index, side) in sides.iter_mut().enumerate() {
            side.wire.clear();
            side.state.connected(received[1 - index]).unwrap();
        }
    }

    proptest! {
        #[test]
        fn messages_come_once_and_in_order_over_any_cuts(steps in prop::collection::vec(step(), 0..200)) {
            let mut sides = [Side::default(), Side::default()];
            for step in steps {
                match step {
                    Step::Queue(at) => {
                        let number = sides[at].queued;
                        sides[at].state.queue(number.to_le_bytes().to_vec());
                        sides[at].queued += 1;
                    }
                    Step::Send(from) => { send(&mut sides, from); }
                    Step::Deliver(to) => { deliver(&mut sides[to]); }
                    Step::Heartbeat(at) => sides[at].state.heartbeat(),
                    Step::Cut => cut(&mut sides),
                }
            }
            cut(&mut sides);
            while (0..2).any(|at| send(&mut sides, at) | deliver(&mut sides[at])) {}
            for at in 0..2 {
                prop_assert_eq!(&sides[at].heard, &(0..sides[1 - at].queued).collect::<Vec<_>>());
                prop_assert!(sides[at].state.is_flushed());
            }
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let mut state = ControlState::default();
        assert_eq!(state.message(1), Err(CountError::Gap { got: 1, expected: 0 }));
        state.queue(vec![1]);
        assert_eq!(state.receipt(1), Err(CountError::Receipt { got: 1, least: 0, most: 0 }));
        assert!(matches!(state.next(), Some(Outgoing::Message { number: 0, .. })));
        assert_eq!(state.receipt(1), Ok(()));
        assert_eq!(state.connected(0), Err(CountError::Receipt { got: 0, least: 1, most: 1 }));
        assert_eq!(state.receipt(u64::MAX), Err(CountError::Receipt { got: u64::MAX, least: 1, most: 1 }));
    }
}
