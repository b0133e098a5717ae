//! How fast a page set is walked: once per round, over every page that the guest has.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageferry::pageset::PageSet;
use pageferry::units::{PageIndex, Run};

/// 16 GiB of guest memory.
const PAGES: u64 = 4 << 20;

/// One page in 1000, scattered: a guest that writes little, all over its memory.
fn sparse() -> PageSet {
    let mut set = PageSet::empty(PAGES);
    // 1,000,003 is odd, so its multiples reach every page of a power of two before one comes twice.
    for step in 0..PAGES / 1000 {
        set.insert(PageIndex(step * 1_000_003 % PAGES));
    }
    set
}

/// Every second page: the most runs that a set can have.
fn alternating() -> PageSet {
    let mut set = PageSet::empty(PAGES);
    set.insert_bitmap(PageIndex(0), &vec![0x5555_5555_5555_5555; (PAGES / 64) as usize]);
    set
}

/// Runs of 256 pages with gaps between them: buffers that were filled.
fn buffers() -> PageSet {
    let mut set = PageSet::empty(PAGES);
    for start in (0..PAGES).step_by(1024) {
        set.insert_run(Run::new(start, 256));
    }
    set
}

fn walk(c: &mut Criterion) {
    let mut group = c.benchmark_group("page_set/runs");
    group.throughput(Throughput::Elements(PAGES));
    for (name, set) in [
        ("empty", PageSet::empty(PAGES)),
        ("sparse", sparse()),
        ("buffers", buffers()),
        ("alternating", alternating()),
        ("full", PageSet::full(PAGES)),
    ] {
        let walk = |set: &PageSet| set.runs().fold(0, |pages, run| pages + run.pages);
        assert_eq!(walk(&set), set.len(), "the walk sees every page");
        group.bench_with_input(BenchmarkId::from_parameter(name), &set, |bencher, set| {
            bencher.iter(|| walk(black_box(set)));
        });
    }
    group.finish();
}

fn combine(c: &mut Criterion) {
    let mut group = c.benchmark_group("page_set/combine");
    group.throughput(Throughput::Elements(PAGES));
    let (sparse, buffers) = (sparse(), buffers());
    let mut set = PageSet::empty(PAGES);
    group.bench_function("union", |bencher| bencher.iter(|| set.union(black_box(&sparse))));
    group.bench_function("subtract", |bencher| bencher.iter(|| set.subtract(black_box(&buffers))));
    group.bench_function("len", |bencher| bencher.iter(|| black_box(&sparse).len()));
    let bitmap = vec![0x8000_0000_0000_0001; (PAGES / 64) as usize];
    group.bench_function("insert_bitmap", |bencher| {
        bencher.iter(|| set.insert_bitmap(PageIndex(0), black_box(&bitmap)));
    });
    group.finish();
}

criterion_group!(benches, walk, combine);
criterion_main!(benches);
