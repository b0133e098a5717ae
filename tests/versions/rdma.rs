//! What goes over the connection of an RDMA channel.

use pageferry::wire::rdma::{
    Answer, AnswerHeader, End, FromDestination, FromDestinationHeader, Offer, OfferHeader, Want,
};

use super::{recorded, understands};

#[test]
fn rdma() {
    const END: End = End { queue_pair: 0x00fe_dcba, packet: 0x0012_3456, mtu: 2048, gid: [0x5a; 16] };
    let offer = || Offer { end: END, frames: 64, piece_bytes: 2 << 20, map: vec![0b101, 0, 1] };
    let answer = |name, answer: Answer| {
        let sent = answer.clone();
        recorded(
            name,
            move || sent.encode(),
            move |bytes| {
                let (head, text) = bytes.split_first_chunk().unwrap();
                assert_eq!(AnswerHeader::decode(head).unwrap().with_text(text), answer);
            },
        )
    };
    let told = |name, told: FromDestination| {
        let sent = told.clone();
        recorded(
            name,
            move || sent.encode(),
            move |bytes| {
                let (head, rest) = bytes.split_first_chunk().unwrap();
                assert_eq!(FromDestinationHeader::decode(head, 30).unwrap().with_rest(rest), told);
            },
        )
    };
    understands([
        recorded(
            "rdma-offer",
            move || offer().encode(),
            move |bytes| {
                let (head, map) = bytes.split_first_chunk().unwrap();
                assert_eq!(OfferHeader::decode(head).unwrap().with_map(map.to_vec()), offer());
            },
        ),
        answer("rdma-taken", Answer::Taken { end: END, frames: 32 }),
        answer("rdma-refused", Answer::Refused("this host has no RDMA device".into())),
        told("rdma-key", FromDestination::Key { piece: 29, key: 0x89ab_cdef, address: 0x7f00_0020_0000 }),
        told("rdma-no-key", FromDestination::NoKey { piece: 3, text: "memory cannot be registered".into() }),
        recorded(
            "rdma-want",
            || Want(29).encode().to_vec(),
            |bytes| {
                assert_eq!(Want::decode(bytes.try_into().unwrap(), 30), Ok(Want(29)));
            },
        ),
    ]);
}
