//! The fence: the only module that may say `unsafe`.
//!
//! What it offers upwards is safe: ranges are checked against the mapping that they lie in, buffers outlive the kernel's
//! use of them, and no Rust reference to guest RAM is ever made, because the guest writes while we read.
#![allow(unsafe_code)]

pub mod huge;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
pub mod mapping;
pub mod pagemap;
pub mod scatter;
pub mod socket;
pub mod userfaultfd;
#[cfg(feature = "rdma")]
pub mod verbs;
