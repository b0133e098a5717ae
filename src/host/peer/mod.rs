//! What daemons say to each other: HTTP with JSON bodies, under mutual TLS where hosts have certificates.

pub mod client;
pub mod messages;
pub mod reach;
pub mod server;
