//! RDMA verbs, fenced: the part of libibverbs that a migration needs, loaded at run time.
//!
//! [`devices`] lists what there is; a [`Device`] opens into a [`Context`], from which everything else is made. Each value
//! holds what it was made from, so that they end in an order that the library allows. Sources: `infiniband/verbs.h` of
//! rdma-core and the manual page of each function, which has the name of the function.
//!
//! What memory has to do with safety: the device reads and writes registered memory at any time, as a guest does, so that
//! only a [`Mapping`](super::mapping::Mapping) is ever registered, to which no Rust reference exists. A [`MemoryRegion`]
//! keeps its mapping until the device has let go of it; work that is under way then fails and harms nothing.

mod abi;
mod completion;
mod device;
mod error;
#[cfg(test)]
mod layout;
mod library;
mod memory;
mod on_demand;
mod queue_pair;
mod work;

pub use completion::{Completion, CompletionQueue, Status, Work};
pub use device::{
    AsyncEvent, Context, Device, DeviceLimits, GidEntry, GidKind, LinkLayer, PortAttributes, PortState,
    Transport, devices,
};
pub use error::VerbsError;
pub use library::LIBRARY;
pub use memory::{Access, MemoryRegion, ProtectionDomain, Residence};
pub use queue_pair::{Depths, QueuePair, QueuePairState, Remote, Retries};
pub use work::{ReceiveBatch, Segment, SendBatch, SendOperation};
