//! What stands around a migration on a host: what a person asks for, sees while it runs, and gets told at the end.

pub mod args;
pub mod demo;
pub mod demo_options;
pub mod exit;
pub mod progress;
pub mod quantity;
pub mod report;
