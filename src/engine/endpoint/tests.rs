//! Who is let in: migrations that are expected by name and secret, and others.

use crossbeam_channel::unbounded;

use super::*;
use crate::session::path::Path;
use crate::session::{ControlLink, ControlOptions, LinkEvent, Opening};
use crate::wire::preamble::RefusalCode;

const EXPECTED: Admission = Admission { migration: MigrationId([1; 16]), secret: Secret([2; 32]) };

fn endpoint() -> (tempfile::TempDir, Endpoint) {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path().join("state")).unwrap();
    let endpoint = Endpoint::bind(&["127.0.0.1:0".parse().unwrap()], journal).unwrap();
    (directory, endpoint)
}

/// Begins a migration; answers its link once it is taken, or why it is not.
fn begin(
    endpoint: &Endpoint,
    migration: MigrationId,
    admission: Secret,
) -> Result<(ControlLink, Receiver<LinkEvent>), SessionError> {
    let (sender, events) = unbounded();
    let path = Path::to(endpoint.local_addresses()[0]);
    let opening = Opening { admission, ..Opening::default() };
    ControlLink::dial(&[path], migration, &opening, ControlOptions::default(), sender)
        .map(|link| (link, events))
}

fn declined(endpoint: &Endpoint, migration: MigrationId, admission: Secret) -> String {
    match begin(endpoint, migration, admission) {
        Err(SessionError::Refused { code: RefusalCode::Declined, text, .. }) => text,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was taken"),
    }
}

/// Takes what comes to a place while something else happens.
fn taken<T: Send>(place: Place<'_>, meanwhile: impl FnOnce() -> T + Send) -> (MigrationId, T) {
    std::thread::scope(|scope| {
        let meanwhile = scope.spawn(meanwhile);
        let (migration, link) = place.wait(&CancelSignal::default()).expect("a migration comes");
        let (sender, _events) = unbounded();
        let link = link.accept(sender).expect("its connection is there");
        let done = meanwhile.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        drop(link);
        (migration, done)
    })
}

#[test]
fn who_knows_the_secret_comes_in_once() {
    let (_directory, endpoint) = endpoint();
    let place = endpoint.expect_only(EXPECTED);
    let (migration, begun) = taken(place, || begin(&endpoint, EXPECTED.migration, EXPECTED.secret));
    assert_eq!(migration, EXPECTED.migration);
    begun.expect("it knows the secret");

    // The same proof, overheard, opens nothing more: not on its own, nor while another migration is expected.
    let words = "not waiting for a guest";
    let again = declined(&endpoint, EXPECTED.migration, EXPECTED.secret);
    assert!(again.contains(words), "{again}");
    let _other = endpoint.expect_only(Admission { migration: MigrationId([3; 16]), secret: Secret([4; 32]) });
    let again = declined(&endpoint, EXPECTED.migration, EXPECTED.secret);
    assert!(again.contains(words), "{again}");
}

#[test]
fn a_wrong_secret_is_refused_in_words_and_the_place_stays() {
    let (_directory, endpoint) = endpoint();
    let place = endpoint.expect_only(EXPECTED);
    let mut wrong = EXPECTED.secret;
    wrong.0[0] ^= 1;
    for secret in [wrong, Secret::NONE, Secret([0xff; 32])] {
        let text = declined(&endpoint, EXPECTED.migration, secret);
        assert!(text.contains("the secret that the migration begins with is wrong"), "{text}");
    }
    let (_, begun) = taken(place, || begin(&endpoint, EXPECTED.migration, EXPECTED.secret));
    begun.expect("the right one still comes in");
}

#[test]
fn another_migration_is_refused_whatever_it_knows() {
    let (_directory, endpoint) = endpoint();
    let place = endpoint.expect_only(EXPECTED);
    let text = declined(&endpoint, MigrationId([9; 16]), EXPECTED.secret);
    assert!(text.contains("not waiting for a guest"), "{text}");
    drop(place);
    let text = declined(&endpoint, EXPECTED.migration, EXPECTED.secret);
    assert!(text.contains("not waiting for a guest"), "a place that was given up: {text}");
}

/// A secret that was never drawn lets nobody in, not even who shows the proof of none.
#[test]
fn no_secret_is_no_key() {
    let (_directory, endpoint) = endpoint();
    let _place = endpoint.expect_only(Admission { secret: Secret::NONE, ..EXPECTED });
    let text = declined(&endpoint, EXPECTED.migration, Secret::NONE);
    assert!(text.contains("is wrong"), "{text}");
}

#[test]
fn several_are_expected_at_a_time_and_each_comes_to_its_own_place() {
    let (_directory, endpoint) = endpoint();
    let admission =
        |number| Admission { migration: MigrationId([number; 16]), secret: Secret([number + 100; 32]) };
    let places: Vec<_> = (1..=4).map(|number| endpoint.expect_only(admission(number))).collect();
    let anyone = endpoint.expect();
    for (number, place) in (1..=4).zip(places).rev() {
        let Admission { migration, secret } = admission(number);
        let (came, begun) = taken(place, || begin(&endpoint, migration, secret));
        assert_eq!(came, migration);
        begun.expect("it is expected");
    }
    // A place for anyone is not used up by those, and asks for no secret.
    let (came, begun) = taken(anyone, || begin(&endpoint, MigrationId([8; 16]), Secret::NONE));
    assert_eq!(came, MigrationId([8; 16]));
    begun.expect("anyone may come");
}

#[test]
fn a_place_that_is_called_off_waits_no_more() {
    let (_directory, endpoint) = endpoint();
    let (cancel, signal) = crate::engine::cancel::cancel_pair();
    let place = endpoint.expect_only(EXPECTED);
    cancel.cancel();
    assert!(place.wait(&signal).is_none());
    let text = declined(&endpoint, EXPECTED.migration, EXPECTED.secret);
    assert!(text.contains("not waiting for a guest"), "{text}");
}
