use super::*;
use proptest::prelude::*;

fn header(flags: u32, block: &str, normal: &[u64], zero: &[u64]) -> [u8; PACKET_BYTES] {
    let mut header = [0; PACKET_BYTES];
    let mut put = |at: usize, number: u32| header[at..at + 4].copy_from_slice(&number.to_be_bytes());
    put(0, MAGIC);
    put(4, VERSION);
    put(8, flags);
    put(12, MAX_PAGES as u32);
    put(16, normal.len() as u32);
    put(20, (normal.len() as u64 * PAGE_SIZE) as u32);
    put(32, zero.len() as u32);
    header[64..64 + block.len()].copy_from_slice(block.as_bytes());
    for (index, offset) in normal.iter().chain(zero).enumerate() {
        header[320 + index * 8..328 + index * 8].copy_from_slice(&offset.to_be_bytes());
    }
    header
}

proptest! {
    #[test]
    fn a_packet_is_read_and_any_flipped_bit_is_an_error_or_another_packet(
        sync in any::<bool>(),
        normal in prop::collection::vec(0..1u64 << 40, 1..64),
        zero in prop::collection::vec(0..1u64 << 40, 0..64),
        bit in 0..PACKET_BYTES * 8,
    ) {
        let offsets = |pages: &[u64]| pages.iter().map(|page| page * PAGE_SIZE).collect::<Vec<_>>();
        let packet = PagesPacket { sync, block: "ram0".into(), normal: offsets(&normal), zero: offsets(&zero) };
        let mut bytes = header(u32::from(sync), "ram0", &packet.normal, &packet.zero);
        prop_assert_eq!(PagesPacket::decode(&bytes), Ok(packet.clone()));
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(other) = PagesPacket::decode(&bytes) {
            prop_assert!(other.normal.len() + other.zero.len() <= MAX_PAGES);
            prop_assert!(other.payload_bytes() <= MAX_PAYLOAD_BYTES);
        }
    }
}

#[test]
fn an_emptied_packet_keeps_its_flags() {
    let mut bytes = header(FLAG_SYNC, "ram0", &[0, 4096], &[8192]);
    empty(&mut bytes);
    let packet = PagesPacket::decode(&bytes).unwrap();
    assert!(packet.sync && packet.normal.is_empty() && packet.zero.is_empty());
    assert_eq!(PagesPacket::decode(&sync_packet()), Ok(PagesPacket { block: String::new(), ..packet }));
}

#[test]
fn what_is_wrong_is_named() {
    let wrong = |at: usize, number: u32| {
        let mut bytes = header(0, "ram0", &[0], &[]);
        bytes[at..at + 4].copy_from_slice(&number.to_be_bytes());
        PagesPacket::decode(&bytes).unwrap_err()
    };
    assert_eq!(wrong(0, MAIN_MAGIC), MultifdError::Magic(MAIN_MAGIC));
    assert_eq!(wrong(4, 2), MultifdError::Version(2));
    assert_eq!(wrong(8, 2 << 1), MultifdError::Compressed(4));
    assert_eq!(wrong(16, u32::MAX), MultifdError::TooManyPages { normal: u32::MAX, zero: 0 });
    assert_eq!(wrong(32, 128), MultifdError::TooManyPages { normal: 1, zero: 128 });
    assert_eq!(wrong(20, 65536), MultifdError::Payload { pages: 1, bytes: 65536 });
    assert_eq!(wrong(64, 0), MultifdError::Name);
    assert_eq!(wrong(324, 1), MultifdError::Offset(1));
    let mut bytes = header(0, "", &[0], &[]);
    bytes[64..320].fill(b'x');
    assert_eq!(PagesPacket::decode(&bytes), Err(MultifdError::Name));
}

#[test]
fn the_kind_of_a_packet_is_told_by_its_head() {
    let head = |flags| {
        let bytes = header(flags, "ram0", &[], &[]);
        Head::decode(bytes.first_chunk().unwrap())
    };
    assert_eq!(head(FLAG_SYNC), Ok(Head::Pages));
    assert_eq!(head(FLAG_DEVICE_STATE), Ok(Head::DeviceState));
    assert_eq!(head(1 << 1), Err(MultifdError::Compressed(2)));
    let mut state = [0; DEVICE_STATE_BYTES];
    state[DEVICE_STATE_BYTES - 4..].copy_from_slice(&MAX_STATE_BYTES.to_be_bytes());
    assert_eq!(state_bytes(&state), Ok(MAX_STATE_BYTES));
    state[DEVICE_STATE_BYTES - 1] = 1;
    assert_eq!(state_bytes(&state), Err(MultifdError::State(MAX_STATE_BYTES + 1)));
}

#[test]
fn a_channel_says_which_it_is() {
    let mut bytes = [0; INIT_BYTES];
    bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
    bytes[7] = 1;
    bytes[8..24].fill(7);
    bytes[24] = 3;
    assert_eq!(Init::decode(&bytes), Ok(Init { uuid: [7; 16], channel: 3 }));
    bytes[7] = 2;
    assert_eq!(Init::decode(&bytes), Err(MultifdError::Version(2)));
}

#[test]
fn adjacent_offsets_are_one_run() {
    assert_eq!(runs_at(&[0, 4096, 12288], 10, 4), Some(vec![Run::new(10, 2), Run::new(13, 1)]));
    assert_eq!(runs_at(&[16384], 10, 4), None);
    assert_eq!(runs_at(&[u64::MAX - 4095], 10, 4), None);
}
