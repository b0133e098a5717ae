//! Every byte that crosses the network: bounded decoding, versions. No I/O.

pub mod control;
