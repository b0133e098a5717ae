//! How migrations share the host's bandwidth: what a cap allows is divided evenly between those that it holds for.

use std::collections::BTreeMap;

use crate::host::holder::protocol::Caps;

/// A migration that is sending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sending {
    /// Its identifier.
    pub id: String,
    /// The cap of its host file over everything, in bytes a second.
    pub host_cap: Option<u64>,
    /// The most that it was asked to send.
    pub own_cap: Option<u64>,
    /// The interfaces that it uses, each with the cap of its network where there is one.
    pub interfaces: BTreeMap<String, Option<u64>>,
}

/// What each may send.
#[must_use]
pub fn shares(sending: &[Sending]) -> BTreeMap<String, Caps> {
    let everyone = sending.len().max(1) as u64;
    let share = |cap: u64, among: u64| (cap / among).max(1);
    sending
        .iter()
        .map(|one| {
            let host = one.host_cap.map(|cap| share(cap, everyone));
            let interfaces = one.interfaces.iter().filter_map(|(name, cap)| {
                let among = sending.iter().filter(|other| other.interfaces.contains_key(name)).count() as u64;
                Some((name.clone(), share((*cap)?, among)))
            });
            let caps =
                Caps { total: host.into_iter().chain(one.own_cap).min(), interfaces: interfaces.collect() };
            (one.id.clone(), caps)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sending(id: &str, own_cap: Option<u64>, interfaces: &[(&str, Option<u64>)]) -> Sending {
        Sending {
            id: id.into(),
            host_cap: Some(1000),
            own_cap,
            interfaces: interfaces.iter().map(|(name, cap)| ((*name).to_owned(), *cap)).collect(),
        }
    }

    #[test]
    fn alone_it_has_everything() {
        let shares = shares(&[sending("a", None, &[("x", Some(600)), ("y", None)])]);
        let interfaces = BTreeMap::from([("x".to_owned(), 600)]);
        assert_eq!(shares["a"], Caps { total: Some(1000), interfaces });
    }

    #[test]
    fn a_network_is_divided_between_those_that_use_it() {
        let all = [
            sending("a", None, &[("x", Some(600))]),
            sending("b", Some(100), &[("x", Some(600)), ("y", Some(50))]),
            sending("c", Some(900), &[("y", Some(50))]),
        ];
        let shares = shares(&all);
        assert_eq!(shares["a"].total, Some(333));
        assert_eq!(shares["b"].total, Some(100));
        assert_eq!(shares["b"].interfaces, BTreeMap::from([("x".to_owned(), 300), ("y".to_owned(), 25)]));
        assert_eq!(shares["c"].total, Some(333));
    }

    #[test]
    fn a_share_is_never_nothing_and_without_caps_there_is_none() {
        let many: Vec<Sending> = (0..5)
            .map(|id| Sending { id: id.to_string(), host_cap: Some(2), ..Sending::default() })
            .collect();
        assert!(shares(&many).values().all(|caps| caps.total == Some(1)));
        assert_eq!(shares(&[Sending { id: "a".into(), ..Sending::default() }])["a"], Caps::default());
    }
}
