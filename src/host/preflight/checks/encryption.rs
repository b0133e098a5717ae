//! Whether memory is encrypted on its way, and whether it can be.

use super::source::SourceView;
use super::{failed, note, passed};
use crate::host::api::check::{Check, PathInfo};
use crate::host::preflight::HostFacts;
use crate::session::TransferMode;

/// Whether a host demands that memory is encrypted on this path.
fn demanded(view: &SourceView<'_>, path: &PathInfo) -> bool {
    let ours = view.ours.requires_encryption && !path.isolated;
    ours || view.theirs.requires_encryption && !path.peer_isolated
}

/// Why RDMA is used on no path, where that is for the want of encryption.
pub(super) fn forbids_rdma(view: &SourceView<'_>) -> Option<String> {
    let all = !view.paths.is_empty() && view.paths.iter().all(|path| demanded(view, path));
    all.then(|| {
        format!("{}, and RDMA's payload is plain; mark its network isolated = true to allow it", who(view))
    })
}

/// Who demands it, as the beginning of a sentence.
fn who(view: &SourceView<'_>) -> String {
    match (view.ours.requires_encryption, view.theirs.requires_encryption) {
        (true, true) => "both host files demand encryption".to_owned(),
        (true, false) => format!("the host file of {} demands encryption", view.ours.name),
        _ => format!("the host file of {} demands encryption", view.theirs.name),
    }
}

pub(super) fn encryption(view: &SourceView<'_>) -> Check {
    const NAME: &str = "encryption";
    if !view.ours.requires_encryption && !view.theirs.requires_encryption {
        return passed(NAME, "no host file demands encryption: guest memory travels in plain");
    }
    let (encrypted, plain): (Vec<_>, Vec<_>) = view.paths.iter().partition(|path| demanded(view, path));
    let who = who(view);
    if encrypted.is_empty() {
        return passed(NAME, format!("{who}, but all networks are isolated: guest memory travels in plain"));
    }
    if let Some((why, advice)) = [view.ours, view.theirs].into_iter().find_map(cannot) {
        return failed(NAME, format!("{who}, and {why}"), advice);
    }
    if plain.is_empty() {
        return passed(NAME, format!("{who}: guest memory is encrypted on its way"));
    }
    let names = |paths: &[&PathInfo]| {
        let mut names: Vec<&str> = paths.iter().map(|path| path.interface.as_str()).collect();
        names.dedup();
        names.join(", ")
    };
    let finding = format!(
        "{who}: guest memory is encrypted on {}, and plain on {}, which is isolated",
        names(&encrypted),
        names(&plain)
    );
    let rdma = matches!(view.mode, TransferMode::Rdma | TransferMode::Auto)
        && view.ours.no_rdma.is_none()
        && view.theirs.no_rdma.is_none();
    if rdma {
        let finding = format!("{finding}; RDMA encrypts nothing and is used on {} only", names(&plain));
        return note(NAME, finding, "mark other networks isolated = true where nobody else is on them");
    }
    passed(NAME, finding)
}

/// Why memory cannot be encrypted at a host, and what to do.
fn cannot(host: &HostFacts) -> Option<(String, String)> {
    let name = &host.name;
    if host.insecure {
        let why = format!("{name} has no certificates");
        let advice = format!(
            "give {name} a certificate (`pageferry pki issue`, [tls] in its host file), or mark the network isolated = true where \
             nobody else is on it"
        );
        return Some((why, advice));
    }
    (!host.takes_encrypted).then(|| {
        let why = format!("{name} (pageferry {}) does not encrypt memory", host.versions.program);
        (why, format!("update pageferry at {name}"))
    })
}
