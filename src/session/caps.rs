//! How much a session may send: over everything, and over single interfaces. Set by whoever shares the host's bandwidth, at any time.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Caps in bytes a second. The clones share them.
#[derive(Clone, Default)]
pub struct RateCaps(Arc<Shared>);

#[derive(Default)]
struct Shared {
    caps: Mutex<Caps>,
    /// Rises at each change, so that a session sees one without the lock.
    changes: AtomicU64,
}

/// The caps of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// Over all interfaces together; `None` is without a limit.
    pub total: Option<u64>,
    /// Over single interfaces, by name.
    pub interfaces: BTreeMap<String, u64>,
}

impl RateCaps {
    /// A cap over everything.
    #[must_use]
    pub fn new(total: Option<u64>) -> Self {
        let caps = Self::default();
        caps.set_total(total);
        caps
    }

    fn lock(&self) -> MutexGuard<'_, Caps> {
        // Replaced in single steps.
        self.0.caps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the cap over everything, from now on.
    pub fn set_total(&self, total: Option<u64>) {
        self.lock().total = total;
        self.0.changes.fetch_add(1, Ordering::Release);
    }

    /// Sets the caps over single interfaces, from now on, in place of all that were set before.
    pub fn set_interfaces(&self, interfaces: BTreeMap<String, u64>) {
        self.lock().interfaces = interfaces;
        self.0.changes.fetch_add(1, Ordering::Release);
    }

    /// The caps of this moment.
    #[must_use]
    pub fn now(&self) -> Caps {
        self.lock().clone()
    }

    /// A number that is another one after each change.
    pub(super) fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Acquire)
    }
}

impl fmt::Debug for RateCaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.now().fmt(f)
    }
}
