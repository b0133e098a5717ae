//! Which payload has to be encrypted: what each host demands, and what that means for a path.

use std::net::IpAddr;

use super::path::Path;
use super::trust::PeerTrust;

/// Why a path is left out of RDMA.
const NO_RDMA: &str = "and RDMA's payload is plain; mark its network isolated = true to allow it";

/// What a host demands of the payload on its way. By default nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encryption {
    /// Whether payload is encrypted, except on isolated networks.
    pub required: bool,
    /// The host's own addresses on networks that nobody else is on.
    pub isolated: Vec<IpAddr>,
}

impl Encryption {
    /// Whether the host demands encryption of a connection that it has at this address of its own; where it is not known which,
    /// it does as on any network.
    #[must_use]
    pub fn demands(&self, own: Option<IpAddr>) -> bool {
        let isolated = |own: IpAddr| self.isolated.iter().any(|at| at.to_canonical() == own.to_canonical());
        self.required && !own.is_some_and(isolated)
    }

    /// Why a plain connection at this address is refused, in words, if it is.
    pub(super) fn refuses_plain(&self, own: IpAddr) -> Option<&'static str> {
        self.demands(Some(own)).then_some(
            "the host file of the destination demands encryption, and this data channel is plain; the source needs certificates and a \
             release that encrypts, or the destination's host file isolated = true for the network",
        )
    }

    /// Why a channel of RDMA at this address is refused, in words, if it is.
    #[cfg(feature = "rdma")]
    pub(super) fn refuses_rdma(&self, own: IpAddr) -> Option<String> {
        self.demands(Some(own))
            .then(|| format!("the host file of the destination demands encryption, {NO_RDMA}"))
    }
}

/// What both hosts of a migration demand, and what the source has to do it with.
#[derive(Clone, Debug, Default)]
pub struct EncryptionPolicy {
    /// How both prove which host they are: what encrypts.
    pub trust: PeerTrust,
    /// What the source demands.
    pub ours: Encryption,
    /// What the destination demands.
    pub theirs: Encryption,
    /// Whether the destination takes encrypted data channels.
    pub theirs_can: bool,
}

impl EncryptionPolicy {
    /// Who demands that payload on this path is encrypted, as the beginning of a sentence.
    fn who_demands(&self, path: &Path) -> Option<&'static str> {
        if self.ours.demands(path.source) {
            Some("the host file demands encryption")
        } else if self.theirs.demands(Some(path.destination.ip())) {
            Some("the host file of the destination demands encryption")
        } else {
            None
        }
    }

    /// Whether payload on this path has to be encrypted.
    #[must_use]
    pub fn demands(&self, path: &Path) -> bool {
        self.who_demands(path).is_some()
    }

    /// Why there is no RDMA on this path, if it is for the want of encryption.
    #[must_use]
    pub fn forbids_rdma(&self, path: &Path) -> Option<String> {
        self.who_demands(path).map(|who| format!("{who}, {NO_RDMA}"))
    }

    /// The same where it holds for all of these paths; the reason for the first.
    #[must_use]
    pub fn forbids_all_rdma(&self, paths: &[Path]) -> Option<String> {
        let reasons: Option<Vec<_>> = paths.iter().map(|path| self.forbids_rdma(path)).collect();
        reasons.and_then(|reasons| reasons.into_iter().next())
    }

    /// Why this path cannot be encrypted, where it has to be.
    pub(super) fn cannot(&self, path: &Path) -> Option<String> {
        let who = self.who_demands(path)?;
        let why = if self.trust.trust.is_insecure() {
            "this host has no certificates ([tls] in its host file)"
        } else if !self.theirs_can {
            "the destination has no certificates, or is of a release that does not encrypt memory"
        } else {
            return None;
        };
        Some(format!("{who}, and {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        text.parse().unwrap()
    }

    fn requiring(isolated: &[&str]) -> Encryption {
        Encryption { required: true, isolated: isolated.iter().map(|at| at.parse().unwrap()).collect() }
    }

    #[test]
    fn either_host_demands_for_its_own_networks() {
        let (one, other) = (path("10.0.1.1-10.0.1.2"), path("10.0.2.1-10.0.2.2"));
        let off = Encryption { required: false, isolated: Vec::new() };
        for (ours, theirs, demanded) in [
            (off.clone(), off.clone(), [false, false]),
            (requiring(&[]), off.clone(), [true, true]),
            (off.clone(), requiring(&[]), [true, true]),
            (requiring(&["10.0.1.1"]), off.clone(), [false, true]),
            (off, requiring(&["10.0.2.2"]), [true, false]),
            // What one host calls isolated, the other need not.
            (requiring(&["10.0.1.1"]), requiring(&["10.0.2.2"]), [true, true]),
            (requiring(&["10.0.1.1", "10.0.2.1"]), requiring(&["10.0.1.2"]), [false, true]),
        ] {
            let policy = EncryptionPolicy { ours, theirs, ..EncryptionPolicy::default() };
            assert_eq!([policy.demands(&one), policy.demands(&other)], demanded, "{policy:?}");
            let all = policy.forbids_all_rdma(&[one, other]);
            assert_eq!(all.is_some(), demanded == [true, true]);
            assert_eq!(policy.cannot(&one).is_some(), demanded[0], "nobody has certificates");
        }
        // By whatever address the routing table chooses.
        assert!(requiring(&["10.0.1.1"]).demands(None));
        assert!(!requiring(&["10.0.1.1"]).demands(Some("::ffff:10.0.1.1".parse().unwrap())));
    }

    #[test]
    fn what_is_demanded_is_said() {
        let policy = EncryptionPolicy { ours: requiring(&[]), ..EncryptionPolicy::default() };
        let one = path("10.0.1.1-10.0.1.2");
        assert_eq!(
            policy.forbids_rdma(&one).unwrap(),
            "the host file demands encryption, and RDMA's payload is plain; mark its network isolated = true to allow it"
        );
        assert_eq!(
            policy.cannot(&one).unwrap(),
            "the host file demands encryption, and this host has no certificates ([tls] in its host file)"
        );
    }
}
