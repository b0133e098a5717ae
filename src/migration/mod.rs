//! The migration core: what happens in which order, with no I/O and no clock.
//!
//! Two machines, [`source::Source`] and [`destination::Destination`], one at each end. Both are used in the same way:
//! `handle` takes an input and the time (since the migration began, as the caller measures it), `poll_action` gives the
//! actions that follow, in order, until it answers `None`, and `poll_timeout` says when `handle_timeout` is due. They see
//! sets of pages, never a page's bytes.
//!
//! The parts: [`ledger`] (which pages are owed), [`convergence`] (whether to go on, stop or give up), [`handover`] (who may
//! run the guest).

pub mod convergence;
pub mod destination;
pub mod handover;
pub mod ledger;
pub mod source;
#[cfg(test)]
mod transitions;
