//! What both ends of a measurement tell each other, in JSON over the control link, and what of it is believed.

use serde::{Deserialize, Serialize};

use super::machine::{Machine, bookkeeping};
use crate::host::view::words::clean;
use crate::layout::MAX_BYTES;
use crate::units::{Bytes, PAGE_SIZE};

/// Both ends say it first, and have to say the same.
pub(super) const VERSION: u32 = 1;
/// The longest message.
pub(super) const MAX_BYTES_OF_A_MESSAGE: usize = 64 << 10;
/// The longest text in one.
const MAX_TEXT: usize = 400;

/// What the sending end says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum FromSource {
    /// First of all.
    Hello {
        /// [`VERSION`].
        version: u32,
    },
    /// Memory is to be received.
    Receive(Receive),
    /// All of it is sent.
    Done,
}

/// Memory that is to be received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Receive {
    /// The name of this transfer: 32 hexadecimal digits.
    pub(super) migration: String,
    /// How much memory it has.
    pub(super) memory_bytes: u64,
    /// How much of it comes at most, other than zeros.
    pub(super) in_use_bytes: u64,
    /// Whether it is to be populated before.
    pub(super) warm: bool,
}

/// What the receiving end says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum FromDestination {
    /// First of all.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Where it runs.
        machine: Machine,
        /// What it can do beyond plain TCP, as [`crate::session::Capabilities`] names it.
        can: Vec<String>,
    },
    /// The memory is there: 64 hexadecimal digits that its channels have to know.
    Ready {
        /// Those digits.
        secret: String,
    },
    /// It does not do what it is asked.
    Refused {
        /// Why.
        why: String,
    },
    /// What became of the memory.
    Received(Received),
}

/// What became of memory at the receiving end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Received {
    /// Processor time of the process, from when it was ready.
    pub(super) cpu_seconds: f64,
    /// Page faults of the process meanwhile.
    pub(super) page_faults: u64,
    /// How long its threads took to put pages into memory.
    pub(super) placing_seconds: f64,
    /// How much of that was taking compressed pages apart.
    pub(super) unpacking_seconds: f64,
    /// The most memory of its own meanwhile, beyond what it had before.
    pub(super) memory_bytes: u64,
    /// Digest of the memory: 32 hexadecimal digits.
    pub(super) digest: String,
    /// Pages that hold something other than zeros.
    pub(super) nonzero_pages: u64,
}

/// Why a message is not one, or cannot be believed.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("a message of {0} bytes; {MAX_BYTES_OF_A_MESSAGE} is the limit")]
    TooLong(usize),
    #[error("a message that cannot be read")]
    Unreadable(#[source] serde_json::Error),
    #[error("a message whose {0} cannot be")]
    Impossible(&'static str),
}

pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    // Numbers, short texts and lists of them: nothing that JSON cannot hold. An empty message is refused by the reader.
    serde_json::to_vec(message).unwrap_or_default()
}

fn decode<T: for<'a> Deserialize<'a>>(message: &[u8]) -> Result<T, MessageError> {
    if message.len() > MAX_BYTES_OF_A_MESSAGE {
        return Err(MessageError::TooLong(message.len()));
    }
    serde_json::from_slice(message).map_err(MessageError::Unreadable)
}

impl FromSource {
    pub(super) fn decode(message: &[u8]) -> Result<Self, MessageError> {
        decode(message)
    }
}

impl FromDestination {
    /// Texts are cut and made safe to print; figures that no machine has are refused.
    pub(super) fn decode(message: &[u8]) -> Result<Self, MessageError> {
        let short = |text: &str| clean(&text.chars().take(MAX_TEXT).collect::<String>());
        let believable = |seconds: f64| (0.0..1e9).contains(&seconds);
        Ok(match decode(message)? {
            Self::Hello { version, machine, can } => {
                if !(1..=1 << 20).contains(&machine.cores) {
                    return Err(MessageError::Impossible("number of processors"));
                }
                let Machine { cores, cpu, kernel } = machine;
                let machine = Machine { cores, cpu: short(&cpu), kernel: short(&kernel) };
                Self::Hello { version, machine, can }
            }
            Self::Refused { why } => Self::Refused { why: short(&why) },
            Self::Received(received) => {
                let times = [received.cpu_seconds, received.placing_seconds, received.unpacking_seconds];
                if !times.into_iter().all(believable) {
                    return Err(MessageError::Impossible("processor time"));
                }
                Self::Received(received)
            }
            ready @ Self::Ready { .. } => ready,
        })
    }
}

impl Receive {
    /// Why this host, which has so much memory left, does not receive it.
    pub(super) fn objection(&self, left: u64) -> Option<String> {
        let Self { memory_bytes, in_use_bytes, .. } = *self;
        if memory_bytes == 0 || memory_bytes > MAX_BYTES || !memory_bytes.is_multiple_of(PAGE_SIZE) {
            return Some(format!(
                "{memory_bytes} bytes of memory cannot be; 4 KiB to {} can",
                Bytes(MAX_BYTES)
            ));
        }
        if in_use_bytes > memory_bytes {
            return Some(format!("{in_use_bytes} bytes cannot be in use of {memory_bytes}"));
        }
        let populated = if self.warm { memory_bytes } else { in_use_bytes };
        let needed = populated.saturating_add(bookkeeping(memory_bytes));
        (needed > left).then(|| {
            format!(
                "{} of memory are needed here and {} are left; use a smaller --memory",
                Bytes(needed),
                Bytes(left)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(memory_bytes: u64, in_use_bytes: u64) -> Receive {
        Receive { migration: "00".repeat(16), memory_bytes, in_use_bytes, warm: false }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_allocated() {
        let left = 4 << 30;
        assert_eq!(receive(1 << 30, 1 << 30).objection(left), None);
        assert_eq!(receive(256 << 30, 1 << 30).objection(left), None);
        for (refused, words) in [
            (receive(0, 0), "cannot be"),
            (receive(4097, 0), "cannot be"),
            (receive(u64::MAX, 0), "cannot be"),
            (receive(MAX_BYTES + PAGE_SIZE, 0), "cannot be"),
            (receive(4096, 8192), "in use"),
            (receive(8 << 30, 8 << 30), "--memory"),
            // Its bitmaps alone.
            (receive(MAX_BYTES, 0), "--memory"),
            (Receive { warm: true, ..receive(256 << 30, 1 << 30) }, "--memory"),
        ] {
            let why = refused.objection(left).expect("an objection");
            assert!(why.contains(words), "{refused:?}: {why}");
        }
    }

    #[test]
    fn messages_are_read_back_and_nonsense_is_refused() {
        let said = FromSource::Receive(receive(4096, 4096));
        assert_eq!(FromSource::decode(&encode(&said)).unwrap(), said);
        let hello =
            FromDestination::Hello { version: 1, machine: Machine::this(), can: vec!["zstd".to_owned()] };
        assert_eq!(FromDestination::decode(&encode(&hello)).unwrap(), hello);
        let received = FromDestination::Received(Received { cpu_seconds: 1e300, ..Received::default() });
        assert!(matches!(FromDestination::decode(&encode(&received)), Err(MessageError::Impossible(_))));
        let none = FromDestination::Hello { version: 1, machine: Machine::default(), can: Vec::new() };
        assert!(matches!(FromDestination::decode(&encode(&none)), Err(MessageError::Impossible(_))));
        assert!(matches!(FromSource::decode(b"{}"), Err(MessageError::Unreadable(_))));
        assert!(matches!(FromSource::decode(&[b' '; 70_000]), Err(MessageError::TooLong(70_000))));
    }

    #[test]
    fn a_refusal_cannot_paint_the_terminal() {
        let said = FromDestination::Refused { why: format!("\u{1b}[31m{}", "x".repeat(5000)) };
        let FromDestination::Refused { why } = FromDestination::decode(&encode(&said)).unwrap() else {
            panic!("a refusal")
        };
        assert!(!why.contains('\u{1b}') && why.len() < 2000, "{why}");
    }
}
