//! Whether memory is encrypted on its way.

use super::*;

/// Whether memory is encrypted follows from what both host files demand, and what they call isolated.
#[test]
fn encryption_is_done_where_it_is_demanded_and_refused_where_it_cannot_be() {
    let found = |change: fn(&mut Case)| {
        let mut case = Case::good();
        change(&mut case);
        case.find("encryption")
    };
    let (status, finding) = found(|_| {});
    assert_eq!(status, CheckStatus::Passed);
    assert!(finding.contains("travels in plain"), "{finding}");
    let (status, finding) = found(|case| case.ours.requires_encryption = true);
    assert_eq!(status, CheckStatus::Passed);
    assert_eq!(finding, "the host file of a demands encryption: guest memory is encrypted on its way");
    // What the source calls isolated is no matter to the destination.
    let (_, finding) = found(|case| {
        case.theirs.requires_encryption = true;
        case.paths.iter_mut().for_each(|path| path.isolated = true);
    });
    assert_eq!(finding, "the host file of b demands encryption: guest memory is encrypted on its way");
    let partly = |case: &mut Case| {
        (case.ours.requires_encryption, case.theirs.requires_encryption) = (true, true);
        (case.paths[1].isolated, case.paths[1].peer_isolated) = (true, true);
    };
    let (status, finding) = found(partly);
    assert_eq!(status, CheckStatus::Passed);
    assert_eq!(
        finding,
        "both host files demand encryption: guest memory is encrypted on eth1, and plain on eth2, which is isolated"
    );
    let mut case = Case::good();
    partly(&mut case);
    case.mode = TransferMode::Rdma;
    (case.ours.no_rdma, case.theirs.no_rdma) = (None, None);
    let (status, finding) = case.find("encryption");
    assert_eq!(status, CheckStatus::Note);
    assert!(finding.ends_with("RDMA encrypts nothing and is used on eth2 only"), "{finding}");
    assert_eq!(case.find("mode").0, CheckStatus::Passed);
    case.paths[1].peer_isolated = false;
    let (status, finding) = case.find("mode");
    assert_eq!(status, CheckStatus::Note);
    assert!(
        finding
            .contains("RDMA is not allowed (both host files demand encryption, and RDMA's payload is plain"),
        "{finding}"
    );

    for (change, words) in [
        ((|case| case.theirs.insecure = true) as fn(&mut Case), "and b has no certificates"),
        (|case| case.theirs.takes_encrypted = false, "and b (pageferry "),
    ] {
        let mut case = Case::good();
        case.ours.requires_encryption = true;
        change(&mut case);
        let (status, finding) = case.find("encryption");
        assert_eq!(status, CheckStatus::Failed);
        assert!(finding.contains(words), "{finding}");
        // Where nothing is encrypted, nobody has to be able to.
        case.paths.iter_mut().for_each(|path| path.isolated = true);
        assert_eq!(case.find("encryption").0, CheckStatus::Passed);
    }
}
