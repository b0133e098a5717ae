use super::*;
use proptest::prelude::*;

fn preamble() -> impl Strategy<Value = Preamble> {
    let purpose = prop_oneof![
        Just(Purpose::NewMigration),
        (any::<u16>(), 0..RECEIVED_LIMIT)
            .prop_map(|(attempt, received)| Purpose::ResumeControl { attempt, received }),
        any::<u32>().prop_map(|channel| Purpose::Data { channel }),
        Just(Purpose::Query),
    ];
    (purpose, any::<[u8; 16]>(), any::<[u8; 32]>(), any::<u16>()).prop_map(
        |(purpose, migration, secret, newer)| Preamble {
            versions: Versions { oldest: 1, newest: newer.max(1) },
            ..Preamble::new(purpose, MigrationId(migration), Secret(secret))
        },
    )
}

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        any::<u64>().prop_map(Reply::accepted),
        (prop::sample::select(&RefusalCode::ALL[..]), "[ -~äöü]{0,400}")
            .prop_map(|(code, text)| Reply::refused(code, &text)),
    ]
}

fn decode_reply(bytes: &[u8]) -> Option<Result<Reply, PreambleError>> {
    let (header, text) = bytes.split_first_chunk()?;
    let header = match ReplyHeader::decode(header) {
        Ok(header) => header,
        Err(error) => return Some(Err(error)),
    };
    Some(header.with_text(text.get(..header.text_bytes())?))
}

proptest! {
    #[test]
    fn a_preamble_survives_and_a_flipped_bit_is_an_error_or_another_preamble(sent in preamble(), bit in 0..PREAMBLE_BYTES * 8) {
        let mut bytes = sent.encode();
        prop_assert_eq!(Preamble::decode(&bytes), Ok(sent));
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = Preamble::decode(&bytes) {
            prop_assert_ne!(other, sent);
            prop_assert_eq!(other.encode(), bytes);
        }
    }

    #[test]
    fn a_reply_survives_and_a_flipped_or_missing_bit_never_panics(sent in reply(), bit in any::<prop::sample::Index>()) {
        let bytes = sent.encode();
        prop_assert_eq!(decode_reply(&bytes), Some(Ok(sent)));
        for length in 0..bytes.len() {
            prop_assert_eq!(decode_reply(&bytes[..length]), None);
        }
        let (mut flipped, bit) = (bytes.clone(), bit.index(bytes.len() * 8));
        flipped[bit / 8] ^= 1 << (bit % 8);
        let _ = decode_reply(&flipped);
    }
}

#[test]
fn versions_that_do_not_meet_are_named_on_both_sides() {
    let mut theirs = Preamble::new(Purpose::Query, MigrationId([7; 16]), Secret::NONE);
    theirs.versions = Versions { oldest: 5, newest: 9 };
    let error = Preamble::decode(&theirs.encode()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the peer speaks protocol version 5 to 9, this side speaks 1: upgrade the older of the two"
    );
    let mut reply = Reply::refused(RefusalCode::Version, &error.to_string());
    reply.versions = Versions { oldest: 5, newest: 9 };
    let error = decode_reply(&reply.encode()).unwrap().unwrap_err();
    assert!(error.to_string().contains("version 5 to 9, this side speaks 1"), "{error}");
}

#[test]
fn versions_meet_at_the_newest_that_both_speak() {
    let range = |oldest, newest| Versions { oldest, newest };
    assert_eq!(range(1, 3).common(range(2, 9)), Some(3));
    assert_eq!(range(2, 9).common(range(1, 2)), Some(2));
    assert_eq!(range(1, 1).common(range(2, 2)), None);
}

#[test]
fn secrets_compare_and_do_not_print() {
    let mut other = [9; 32];
    assert_eq!(Secret([9; 32]), Secret(other));
    other[31] = 8;
    assert_ne!(Secret([9; 32]), Secret(other));
    assert!(Secret([0; 32]).is_none());
    assert_eq!(format!("{:?}", Secret([9; 32])), "Secret(..)");
}

#[test]
fn a_long_refusal_is_cut_between_characters() {
    let Answer::Refused { text, .. } = Reply::refused(RefusalCode::Declined, &"ä".repeat(400)).answer else {
        panic!("a refusal");
    };
    assert_eq!(text.chars().count(), MAX_REFUSAL_BYTES / 2);
}
