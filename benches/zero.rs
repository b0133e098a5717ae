//! How fast it is found out that a page holds only zero bytes: what every page costs before it is sent.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageferry::layout::RamLayout;
use pageferry::memory::{Backing, GuestMemory, HugePages};
use pageferry::units::{PAGE_SIZE, PageIndex, Run};

/// 16 MiB: more than a core's own cache, as guest memory is.
const PAGES: u64 = 4096;

/// Memory whose pages all hold zero bytes except one word at `place` of each.
fn memory(place: Option<u64>) -> GuestMemory {
    let layout = RamLayout::flat(PAGES * PAGE_SIZE).expect("whole pages");
    let memory = GuestMemory::allocate(layout, Backing::Anonymous, HugePages::No).expect("16 MiB of memory");
    memory.zero_run(Run::new(0, PAGES));
    if let Some(place) = place {
        for page in 0..PAGES {
            let mut bytes = vec![0; PAGE_SIZE as usize];
            bytes[place as usize] = 1;
            memory.write_run(Run::new(page, 1), &bytes);
        }
    }
    memory
}

fn zero(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero");
    group.throughput(Throughput::Bytes(PAGES * PAGE_SIZE));
    for (name, place) in
        [("all zero", None), ("first word", Some(0)), ("middle", Some(2048)), ("last byte", Some(4095))]
    {
        let memory = memory(place);
        let expected = if place.is_none() { PAGES } else { 0 };
        let count = |memory: &GuestMemory| {
            (0..PAGES).filter(|&page| memory.is_zero_page(PageIndex(page))).count() as u64
        };
        group.bench_with_input(BenchmarkId::from_parameter(name), &memory, |bencher, memory| {
            bencher.iter(|| assert_eq!(count(memory), expected));
        });
    }
    group.finish();
}

criterion_group!(benches, zero);
criterion_main!(benches);
