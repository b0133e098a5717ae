//! The guests that this program can hold, by kind: made anew, or as a skeleton for one that arrives.

use crate::dirty::TrackerKind;
use crate::engine::destination::Setup;
use crate::guest::process::{Fill, ProcessConfig, ProcessGuest};
use crate::guest::program::{ProgramConfig, SelfChecking};
use crate::guest::{GuestError, ProcessorError};
use crate::host::demo_options::GuestKind;
use crate::host::holder::protocol::GuestSpec;
use crate::memory::{Backing, HugePages};

/// A guest of any kind.
pub type AnyGuest = Box<dyn SelfChecking>;

/// Makes a guest as described; [`crate::guest::Guest::resume`] starts it.
///
/// # Errors
/// [`GuestError`] naming what this host cannot give it.
pub fn make(spec: &GuestSpec) -> Result<AnyGuest, GuestError> {
    let program = ProgramConfig {
        program: spec.program,
        bytes_per_second: spec.dirty_bytes_per_second,
        touch_bytes: spec.touch_bytes,
        seed: spec.seed,
    };
    match spec.kind {
        GuestKind::Kvm => make_kvm(spec, program),
        GuestKind::Process => Ok(Box::new(ProcessGuest::new(ProcessConfig {
            bytes: spec.memory_bytes,
            backing: Backing::Memfd,
            huge: spec.huge_pages,
            threads: spec.vcpus.into(),
            program,
            fill: Fill::default(),
            tracker: spec.tracker,
        })?)),
    }
}

/// Makes the skeleton of a guest that arrives. `tracker` is this host's choice for its next move.
///
/// # Errors
/// [`GuestError`] when the kind is unknown here, or its adapter refuses the configuration.
pub fn skeleton(
    setup: &Setup,
    tracker: Option<TrackerKind>,
    huge: HugePages,
) -> Result<AnyGuest, GuestError> {
    match setup.guest.as_str() {
        "kvm" => skeleton_kvm(setup, tracker, huge),
        "process" => Ok(Box::new(ProcessGuest::skeleton(&setup.config, huge)?)),
        other => Err(no_adapter(other)),
    }
}

/// Whether a guest of another host, with this configuration, can run on this host's processor.
///
/// # Errors
/// [`ProcessorError`] naming what stands in the way.
pub fn check_processor(kind: &str, config: &[u8]) -> Result<(), ProcessorError> {
    match kind {
        "kvm" => check_kvm_processor(config),
        "process" => Ok(()),
        other => Err(ProcessorError::Config(no_adapter(other))),
    }
}

fn no_adapter(kind: &str) -> GuestError {
    GuestError::new(format!(
        "this host has no adapter for guests of kind {kind:?}; it has {}",
        if cfg!(feature = "kvm") { "kvm and process" } else { "process" }
    ))
}

/// Which tracker suits a guest best.
#[must_use]
pub fn best_tracker(kind: GuestKind) -> TrackerKind {
    match kind {
        GuestKind::Kvm => TrackerKind::Log,
        GuestKind::Process => TrackerKind::Pagemap,
    }
}

/// Why there can be no KVM guest here, or `None` when there can.
#[must_use]
pub fn why_no_kvm() -> Option<String> {
    if !cfg!(all(feature = "kvm", target_arch = "x86_64")) {
        return Some("this build has no KVM support".into());
    }
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.err().map(|cause| format!("/dev/kvm does not open: {cause}"))
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
fn make_kvm(spec: &GuestSpec, program: ProgramConfig) -> Result<AnyGuest, GuestError> {
    use crate::guest::kvm::{KvmConfig, KvmGuest, pc_layout};
    let layout = pc_layout(spec.memory_bytes)
        .map_err(|cause| GuestError::caused(format!("a guest of {} bytes", spec.memory_bytes), cause))?;
    let config =
        KvmConfig { layout, huge: spec.huge_pages, vcpus: spec.vcpus.into(), program, tracker: spec.tracker };
    Ok(Box::new(KvmGuest::new(&config)?))
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
fn skeleton_kvm(
    setup: &Setup,
    tracker: Option<TrackerKind>,
    huge: HugePages,
) -> Result<AnyGuest, GuestError> {
    use crate::guest::kvm::KvmGuest;
    let tracker = tracker.unwrap_or(best_tracker(GuestKind::Kvm));
    Ok(Box::new(KvmGuest::skeleton(&setup.config, huge, tracker)?))
}

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
use crate::guest::kvm::check_processor as check_kvm_processor;

#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
fn check_kvm_processor(_config: &[u8]) -> Result<(), ProcessorError> {
    Err(ProcessorError::Host(GuestError::new("this build has no KVM support")))
}

#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
fn make_kvm(_spec: &GuestSpec, _program: ProgramConfig) -> Result<AnyGuest, GuestError> {
    Err(GuestError::new("this build has no KVM support; use --guest process"))
}

#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
fn skeleton_kvm(
    _setup: &Setup,
    _tracker: Option<TrackerKind>,
    _huge: HugePages,
) -> Result<AnyGuest, GuestError> {
    Err(GuestError::new("this build has no KVM support"))
}
