//! What stands around a migration on a host: what a person asks for, sees while it runs, and gets told at the end; and the
//! process that holds a guest.

pub mod api;
pub mod args;
pub mod bench;
pub mod commands;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod demo_options;
pub mod exit;
mod files;
pub mod guest_process;
pub mod guests;
mod hex;
pub mod history;
pub mod holder;
pub mod logging;
pub mod metrics;
pub mod network;
pub mod peer;
pub mod pki;
pub mod preflight;
pub mod progress;
pub mod qemu;
pub mod quantity;
pub mod rdma;
pub mod relay;
pub mod report;
pub mod report_page;
pub mod supervise;
pub mod view;
