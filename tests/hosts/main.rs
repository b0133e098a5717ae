//! Two daemons on two hosts: namespaces of this machine, joined by links of a known speed (`scripts/netns-lab`).
#![allow(clippy::panic, reason = "a test")]

mod ask;
mod cancels;
mod checks;
mod inside;
mod kills;
mod lab;
mod limits;
mod links;
mod moves;
mod surface;
mod trust;
