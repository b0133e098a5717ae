use proptest::prelude::*;

use super::*;

fn setup() -> Setup {
    Setup {
        name: "web-3".into(),
        guest: "kvm".into(),
        config: vec![1, 2, 3],
        layout: RamLayout::flat(1 << 30).unwrap(),
        touched_pages: 77,
        mode: "auto".into(),
        capabilities: vec!["zstd".into()],
    }
}

fn message() -> impl Strategy<Value = Message> {
    let token = any::<[u8; 16]>().prop_map(Token);
    prop_oneof![
        (any::<String>(), prop::collection::vec(any::<u8>(), 0..100), 0..1000u64).prop_map(
            |(name, config, touched_pages)| Message::Setup(Setup { name, config, touched_pages, ..setup() })
        ),
        any::<[u8; 32]>().prop_map(|secret| Message::Accept(Accept { secret, capabilities: vec![] })),
        (any::<u32>(), any::<u64>())
            .prop_map(|(round, dirtied)| Message::RoundDone { round: RoundId(round), dirtied }),
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Message::State),
        (0..MAX_STATE_BYTES, any::<u64>())
            .prop_map(|(state_bytes, stopped_at)| Message::Finish { state_bytes, stopped_at }),
        token.clone().prop_map(Message::Ready),
        token.clone().prop_map(Message::Commit),
        token.clone().prop_map(Message::Running),
        token.clone().prop_map(Message::Query),
        token.prop_map(Message::Fenced),
        any::<String>().prop_map(Message::Abort),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(message in message()) {
        prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn damage_is_an_error_or_another_message(message in message(), at in any::<prop::sample::Index>(), flip in 1..=255u8) {
        let mut bytes = message.encode();
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(other) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&other.encode()), Ok(other));
            }
        }
    }
}

#[test]
fn lies_are_named() {
    let lie = |change: fn(&mut proto::Setup)| {
        let proto::Body::Setup(mut setup) = proto::Body::from(&Message::Setup(setup())) else {
            unreachable!()
        };
        change(&mut setup);
        Message::try_from(proto::Body::Setup(setup)).unwrap_err().to_string()
    };
    let cases = [
        (lie(|s| s.regions = vec![proto::Region { start: 0, bytes: 4096 }; 65]), "65; 64 is the limit"),
        (lie(|s| s.regions[0].bytes = u64::MAX - 4095), "RAM layout is wrong"),
        (lie(|s| s.regions.clear()), "RAM layout is wrong"),
        (lie(|s| s.touched_pages = 1 << 40), "of 262144 pages are touched"),
        (lie(|s| s.config = vec![0; MAX_CONFIG_BYTES + 1]), "the guest's configuration"),
        (lie(|s| s.name = "n".repeat(1025)), "the guest's name has a length of 1025"),
        (lie(|s| s.capabilities = vec![String::new(); 65]), "the list of capabilities"),
    ];
    for (said, expected) in cases {
        assert!(said.contains(expected), "{said:?} should say {expected:?}");
    }
    assert_eq!(Message::decode(&[]), Err(DecodeError::UnknownBody));
    assert!(matches!(Message::decode(&[0xff; 8]), Err(DecodeError::Malformed(_))));
    let huge = vec![0; MAX_MESSAGE_BYTES + 1];
    assert!(matches!(Message::decode(&huge), Err(DecodeError::Length { .. })));
}

#[test]
fn our_own_long_texts_are_cut_at_a_character() {
    let Message::Abort(cause) = Message::decode(&Message::Abort("ä".repeat(2000)).encode()).unwrap() else {
        panic!("an Abort");
    };
    assert_eq!(cause, "ä".repeat(512));
}

#[test]
fn tokens_are_read_as_they_are_shown() {
    let token = Token([7; 16]);
    assert_eq!(token.to_string().parse(), Ok(token));
    for wrong in ["", "07", &"zz".repeat(16), &"ä".repeat(16)] {
        assert!(wrong.parse::<Token>().is_err(), "{wrong:?}");
    }
}
