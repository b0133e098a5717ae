//! The control link as it is: both ends' own accounting, over connections that are cut and come back. What was on a cut
//! connection is lost and sent again, what had arrived without a receipt arrives twice.

use std::collections::VecDeque;

use pageferry::session::control_state::{ControlState, Outgoing};
use pageferry::wire::control::Message;

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

#[derive(Default)]
pub(crate) struct Link {
    ends: [ControlState; 2],
    /// What is on its way from each end; `None` while there is no connection.
    wires: Option<[VecDeque<Outgoing>; 2]>,
    lost: bool,
}

impl Link {
    pub(crate) fn up() -> Self {
        Self { wires: Some(Default::default()), ..Self::default() }
    }

    pub(crate) fn send(&mut self, from: Side, message: &Message) {
        if !self.lost {
            self.ends[from as usize].queue(message.encode());
        }
    }

    /// Puts a frame onto the wire, or takes one off it. Answers a message that arrived; `None` when nothing could be done.
    pub(crate) fn step(&mut self, from: Side) -> Option<Option<Message>> {
        let (sender, receiver) = (from as usize, from.other() as usize);
        let wires = self.wires.as_mut()?;
        while let Some(frame) = self.ends[sender].outgoing() {
            wires[sender].push_back(frame);
        }
        Some(match wires[sender].pop_front()? {
            Outgoing::Message { number, bytes } => {
                let new = self.ends[receiver].message(number).expect("a connection keeps the order");
                new.then(|| Message::decode(&bytes).expect("what was encoded"))
            }
            Outgoing::Receipt(count) => {
                self.ends[receiver].receipt(count).expect("receipts count what was sent");
                None
            }
        })
    }

    /// The connection breaks; another one can follow.
    pub(crate) fn cut(&mut self) {
        self.wires = None;
    }

    /// The ends find each other again, unless the link was given up. Answers whether that was something to do.
    pub(crate) fn reconnect(&mut self) -> bool {
        if self.lost || self.wires.is_some() {
            return false;
        }
        let received = [self.ends[0].received(), self.ends[1].received()];
        self.ends[0].connected(received[1]).expect("the other end counts right");
        self.ends[1].connected(received[0]).expect("the other end counts right");
        self.wires = Some(Default::default());
        true
    }

    /// The link is given up for good. Answers whether it was there.
    pub(crate) fn lose(&mut self) -> bool {
        self.wires = None;
        !std::mem::replace(&mut self.lost, true)
    }
}
