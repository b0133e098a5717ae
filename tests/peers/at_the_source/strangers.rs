//! Whoever is at the address of the destination is no destination, or wants no guest.

use super::{attempt, hasty, patient};
use crate::liar::{Deed, Liar, Point};
use crate::{LOOPBACK, each};

use pageferry::wire::preamble::{Preamble, RefusalCode, Reply, Versions};

fn reply_of_versions(oldest: u16, newest: u16) -> Vec<u8> {
    let text = "the peer speaks protocol version 1, this side speaks 3 to 4: upgrade the older of the two";
    let mut reply = Reply::refused(RefusalCode::Version, text);
    reply.versions = Versions { oldest, newest };
    reply.encode()
}

#[test]
fn what_answers_the_preamble_is_named() {
    let refusal = Reply::refused(RefusalCode::Declined, "no memory for 4 MiB").encode();
    let mut unknown_code = refusal.clone();
    unknown_code[12] = 99;
    let mut long_text = refusal.clone();
    long_text[14..16].copy_from_slice(&u16::MAX.to_le_bytes());
    let accepted_by_a_newer = {
        let mut reply = Reply::accepted(0);
        reply.versions = Versions { oldest: 3, newest: 4 };
        reply.encode()
    };
    let both = ["version 3 to 4", "this side speaks 1"];
    let cases = vec![
        (
            "another protocol",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec!["does not speak pageferry's protocol"],
        ),
        ("its own preamble back", preamble_back(), vec!["does not speak pageferry's protocol", "PGFERRY"]),
        ("a newer destination that refuses", reply_of_versions(3, 4), both.to_vec()),
        ("a newer destination that accepts", accepted_by_a_newer, both.to_vec()),
        ("no range of versions", reply_of_versions(4, 3), vec!["versions 4 to 3 are no range"]),
        ("a refusal", refusal, vec!["refuses: no memory for 4 MiB"]),
        ("an unknown refusal", unknown_code, vec!["code 99"]),
        ("a text without end", long_text, vec!["a text of 65535 bytes"]),
        ("a reply with something received", Reply::accepted(5).encode(), vec!["it has 5 messages"]),
    ];
    let cases = cases.into_iter().map(|(name, bytes, words)| (name.to_owned(), (bytes, words))).collect();
    each(cases, |name, (bytes, words)| {
        let liar = Liar::start(Point::Preamble, Deed::Reply(bytes), vec![]);
        let ended = attempt(name, patient(liar.address()));
        ended.rolled_back(&words);
        assert_eq!(ended.guest.pauses_and_resumes(), (0, 0), "{name}");
    });
}

fn preamble_back() -> Vec<u8> {
    use pageferry::wire::preamble::{MigrationId, Purpose, Secret};
    Preamble::new(Purpose::Query, MigrationId([0; 16]), Secret::NONE).encode().to_vec()
}

#[test]
fn nobody_listens() {
    let listener = std::net::TcpListener::bind(LOOPBACK).unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let words = format!("cannot connect over {address}");
    attempt("nobody listens", patient(address)).rolled_back(&[&words, "refused"]);
}

#[test]
fn a_connection_without_a_word() {
    let cases = vec![
        ("says nothing".to_owned(), (Deed::FallSilent, "timed out")),
        ("closes".to_owned(), (Deed::Close, "did not answer as a pageferry does")),
        ("three bytes".to_owned(), (Deed::Reply(b"PGF".to_vec()), "timed out")),
    ];
    each(cases, |name, (deed, words)| {
        let liar = Liar::start(Point::Preamble, deed, vec![]);
        let address = liar.address();
        attempt(name, hasty(address)).rolled_back(&[&address.to_string(), words]);
    });
}

/// What opens the migration's doors to a stranger must not be nothing.
#[test]
fn no_path_is_named() {
    let mut options = patient(LOOPBACK);
    options.paths.clear();
    attempt("no path", options).rolled_back(&["no path"]);
}
