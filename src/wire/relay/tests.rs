use super::*;
use crate::wire::control::Message;
use proptest::prelude::*;

fn offer(blocks: usize) -> Offer {
    let block = |number| Block {
        name: format!("ram{number}"),
        bytes: 4096,
        backend: number == 0,
        shared: number > 1,
    };
    Offer {
        hypervisor: "QEMU 10.0.2".into(),
        blocks: (0..blocks).map(block).collect(),
        channels: 2,
        return_path: true,
        tls: false,
        placement: true,
        staging_bytes: 64 << 20,
        mode: "compression".into(),
        capabilities: vec!["zstd".into()],
    }
}

fn answer(placed: u32) -> Answer {
    Answer {
        secret: [7; 32],
        hypervisor: "QEMU 10.0.2".into(),
        placed: (0..placed).collect(),
        because: String::new(),
        capabilities: Vec::new(),
    }
}

fn any_message() -> impl Strategy<Value = RelayMessage> {
    let stream = 0..MAX_STREAMS;
    let bytes = prop::collection::vec(any::<u8>(), 1..2000);
    prop_oneof![
        (0..20usize).prop_map(|blocks| RelayMessage::Offer(offer(blocks))),
        (0..63u32).prop_map(|placed| RelayMessage::Answer(answer(placed))),
        (stream.clone(), bytes.clone()).prop_map(|(stream, bytes)| RelayMessage::Bytes { stream, bytes }),
        stream.clone().prop_map(|stream| RelayMessage::End { stream }),
        (stream.clone(), bytes, any::<u32>(), 0..=MAX_PACKET_BYTES)
            .prop_map(|(stream, header, page, bytes)| RelayMessage::Packet { stream, header, page, bytes }),
        (stream, 0..=STREAM_WINDOW).prop_map(|(stream, bytes)| RelayMessage::Passed { stream, bytes }),
        any::<u32>().prop_map(|page| RelayMessage::Free { page }),
        Just(RelayMessage::Loaded),
        any::<bool>().prop_map(|run| RelayMessage::Commit { run }),
        Just(RelayMessage::Running),
        "[a-z ]{0,200}".prop_map(RelayMessage::Fenced),
        "[a-z ]{0,200}".prop_map(RelayMessage::Abort),
    ]
}

proptest! {
    #[test]
    fn a_message_survives(message in any_message()) {
        prop_assert_eq!(RelayMessage::decode(&message.encode()), Ok(message));
    }
}

#[test]
fn what_is_too_large_is_refused() {
    let refused = |message: RelayMessage| match RelayMessage::decode(&message.encode()) {
        Err(DecodeError::Length { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(RelayMessage::Offer(offer(MAX_BLOCKS + 1))), "the list of RAM blocks");
    assert_eq!(refused(RelayMessage::Answer(answer(64))), "the list of placed RAM blocks");
    assert_eq!(refused(RelayMessage::End { stream: MAX_STREAMS }), "the number of a stream");
    let bytes = vec![0; MAX_STREAM_BYTES + 1];
    assert_eq!(refused(RelayMessage::Bytes { stream: 0, bytes }), "a piece of a stream");
    let packet = |header, bytes| RelayMessage::Packet { stream: 0, header: vec![0; header], page: 0, bytes };
    assert_eq!(refused(packet(MAX_PACKET_HEADER + 1, 0)), "a packet's header");
    assert_eq!(refused(packet(0, MAX_PACKET_BYTES + 1)), "a packet");
}

#[test]
fn neither_protocol_takes_the_others_messages_for_its_own() {
    let theirs = Message::Abort("no".into()).encode();
    assert_eq!(RelayMessage::decode(&theirs), Err(DecodeError::UnknownBody));
    let ours = RelayMessage::Abort("no".into()).encode();
    assert_eq!(Message::decode(&ours), Err(DecodeError::UnknownBody));
}

#[test]
fn a_cause_cannot_steer_a_terminal() {
    let message = RelayMessage::Abort("\u{1b}[31mred".into());
    assert_eq!(RelayMessage::decode(&message.encode()), Ok(RelayMessage::Abort(" [31mred".into())));
}
