use super::*;
use crate::wire::data::BarrierId;
use proptest::prelude::*;

fn end() -> impl Strategy<Value = End> {
    (0..1u32 << 24, 0..1u32 << 24, prop::sample::select(vec![256, 512, 1024, 2048, 4096]), any::<[u8; 16]>())
        .prop_map(|(queue_pair, packet, mtu, gid)| End { queue_pair, packet, mtu, gid })
}

fn read_offer(bytes: &[u8]) -> Result<Offer, RdmaFrameError> {
    let header = OfferHeader::decode(bytes[..OFFER_BYTES].try_into().unwrap())?;
    assert!(header.map_bytes() <= MAX_PIECES as usize / 8);
    let map = bytes.get(OFFER_BYTES..).unwrap_or_default().to_vec();
    Ok(header.with_map(map))
}

fn read_answer(bytes: &[u8]) -> Result<Answer, RdmaFrameError> {
    let header = AnswerHeader::decode(bytes[..ANSWER_BYTES].try_into().unwrap())?;
    assert!(header.text_bytes() <= MAX_ERROR_BYTES);
    Ok(header.with_text(&bytes[ANSWER_BYTES..]))
}

proptest! {
    #[test]
    fn an_offer_survives_and_a_flipped_bit_is_an_error_or_another_offer(
        end in end(), frames in 1..=MAX_FRAMES, piece_bytes in any::<u64>(),
        map in prop::collection::vec(any::<u8>(), 0..64), bit in 0..OFFER_BYTES * 8,
    ) {
        let sent = Offer { end, frames, piece_bytes, map };
        let mut bytes = sent.encode();
        prop_assert_eq!(read_offer(&bytes), Ok(sent));
        bytes[bit / 8] ^= 1 << (bit % 8);
        // The length of the map is the reader's to keep.
        if let Ok(other) = read_offer(&bytes) && !(160..192).contains(&bit) {
            prop_assert_eq!(other.encode(), bytes);
        }
    }

    #[test]
    fn an_answer_survives(end in end(), frames in 1..=MAX_FRAMES, text in "[a-z ]{0,600}") {
        let taken = Answer::Taken { end, frames };
        prop_assert_eq!(read_answer(&taken.encode()), Ok(taken));
        let read = read_answer(&Answer::Refused(text.clone()).encode());
        prop_assert_eq!(read, Ok(Answer::Refused(cut_text(&text, MAX_ERROR_BYTES).to_owned())));
    }

    #[test]
    fn what_the_destination_says_survives(piece in 0..7u32, key in any::<u32>(), address in any::<u64>(), text in "[a-z]{0,40}") {
        for sent in [
            FromDestination::Receipt(Receipt::Placed(address)),
            FromDestination::Receipt(Receipt::Barrier(BarrierId(address))),
            FromDestination::Receipt(Receipt::Error(text.clone())),
            FromDestination::Key { piece, key, address },
            FromDestination::NoKey { piece, text },
        ] {
            let bytes = sent.encode();
            let first = bytes[..RECEIPT_BYTES].try_into().unwrap();
            let header = FromDestinationHeader::decode(first, 7).unwrap();
            prop_assert_eq!(header.with_rest(&bytes[RECEIPT_BYTES..]), sent.clone());
            if !matches!(sent, FromDestination::Receipt(_)) {
                let unknown = FromDestinationHeader::decode(first, piece);
                prop_assert_eq!(unknown, Err(RdmaFrameError::Piece { got: piece, pieces: piece }));
            }
        }
    }
}

#[test]
fn what_cannot_be_is_named() {
    let end = End { queue_pair: 1, packet: 2, mtu: 1024, gid: [0; 16] };
    let offer = Offer { end, frames: 1, piece_bytes: 4096, map: vec![1] };
    let with = |at: usize, value: u32| {
        let mut bytes = offer.encode();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        read_offer(&bytes).unwrap_err().to_string()
    };
    assert_eq!(with(4, 0), "the number of frames under way is 0, which cannot be");
    assert_eq!(with(4, MAX_FRAMES + 1), "the number of frames under way is 4097, which cannot be");
    assert_eq!(with(8, 1 << 24), "the number of a queue pair is 16777216, which cannot be");
    assert_eq!(with(16, 1500), "the MTU of an RDMA path is 1500, which cannot be");
    assert_eq!(with(20, MAX_PIECES / 8 + 1), "the length of the map of pieces is 2049, which cannot be");
    assert_eq!(with(0, 0x4b4f_4f4b), "a message about RDMA begins with KOOK instead of its magic");
    let want = Want(3).encode();
    assert_eq!(Want::decode(&want, 4), Ok(Want(3)));
    let unknown = Want::decode(&want, 3).unwrap_err().to_string();
    assert_eq!(unknown, "piece 3 of the guest's memory is spoken of, and there are 3");
}
