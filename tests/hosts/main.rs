//! Two daemons on two hosts: namespaces of this machine, joined by links of a known speed (`scripts/netns-lab`).

mod cancels;
mod inside;
mod kills;
mod lab;
mod moves;
