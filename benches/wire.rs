//! What encoding and decoding a data frame costs, next to the megabyte that it is for.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use pageferry::layout::RamLayout;
use pageferry::units::{RoundId, Run};
use pageferry::wire::data::{FrameKind, HEADER_BYTES, Header, encode_pages};

/// Batches of 256 pages: one run, and as scattered as can be.
fn batches() -> [(&'static str, Vec<Run>); 2] {
    [("1 run", vec![Run::new(4096, 256)]), ("256 runs", (0..256).map(|n| Run::new(n * 7, 1)).collect())]
}

fn frames(c: &mut Criterion) {
    let layout = RamLayout::flat(64 << 30).expect("a layout");
    for (name, runs) in batches() {
        let mut bytes = Vec::new();
        c.bench_function(&format!("encode a frame of {name}"), |b| {
            b.iter(|| {
                bytes.clear();
                encode_pages(FrameKind::Raw, RoundId(3), 9, black_box(&runs), 256 * 4096, &mut bytes);
            });
        });
        let (head, table) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a frame");
        let mut decoded = Vec::new();
        c.bench_function(&format!("decode a frame of {name}"), |b| {
            b.iter(|| {
                let header = Header::decode(black_box(head)).expect("a header");
                header.decode_runs(black_box(table), &layout, &mut decoded).expect("runs")
            });
        });
    }
}

criterion_group!(benches, frames);
criterion_main!(benches);
