//! The destination lies about what it has received.

use super::{attempt, patient};
use crate::each;
use crate::liar::{Answer, Deed, Liar, Point};

use pageferry::wire::data::{BarrierId, Receipt};

#[test]
fn a_receipt_that_cannot_be_ends_the_migration() {
    let receipt = |receipt: Receipt| receipt.encode();
    let mut kind = receipt(Receipt::Placed(1));
    kind[4] = 77;
    let mut reserved = receipt(Receipt::Placed(1));
    reserved[5] = 1;
    let mut text = receipt(Receipt::Error("no".into()));
    text[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
    let lies = [
        ("a frame that was not sent", receipt(Receipt::Placed(1000)), "confirms frame 1000, but only"),
        (
            "every frame there can be",
            receipt(Receipt::Placed(u64::MAX)),
            "confirms frame 18446744073709551615",
        ),
        ("a barrier that was not sent", receipt(Receipt::Barrier(BarrierId(99))), "confirms barrier 99"),
        ("a barrier of the end of time", receipt(Receipt::Barrier(BarrierId(u64::MAX))), "confirms barrier"),
        ("no receipt", b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), "begins with HTTP"),
        ("an unknown kind", kind, "kind 77"),
        ("a reserved bit", reserved, "reserved field"),
        ("an error text without end", text, "an error text of 65535 bytes"),
        (
            "an error",
            receipt(Receipt::Error("page 3 does not fit".into())),
            "the destination refuses the data: page 3",
        ),
    ];
    let points = [Point::Round, Point::Barrier, Point::LastRound];
    let cases = points.into_iter().flat_map(|point| {
        // With two channels too: a peer that lies on one is not to be trusted on the other.
        [1, 2].into_iter().flat_map(move |channels| [(point, channels)])
    });
    for (point, channels) in cases {
        let cases = lies.clone().map(|(name, bytes, words)| {
            (format!("{name}, at {point:?} on one of {channels}"), (bytes, words))
        });
        each(cases.to_vec(), |name, (bytes, words)| {
            let liar = Liar::start(point, Deed::Receipt(bytes), vec![Answer::Close]);
            let mut options = patient(liar.address());
            options.channels = channels;
            attempt(name, options).rolled_back(&[words]);
        });
    }
}
