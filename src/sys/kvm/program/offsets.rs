//! Where the program keeps what, as it and the VMM see it.

/// The status page of a vCPU: what the guest keeps, and what the VMM reads. Offsets in bytes; 64 bits each.
pub mod status {
    /// How often the program was started: 1, or else it is corrupt.
    pub const STARTS: u64 = 0x00;
    /// Ticks taken.
    pub const HEARTBEATS: u64 = 0x08;
    /// Pages written.
    pub const WRITES: u64 = 0x10;
    /// Stamps found right.
    pub const VERIFIED: u64 = 0x18;
    /// Stamps found wrong.
    pub const CORRUPT: u64 = 0x20;
    /// The address (in the window) of the first wrong stamp.
    pub const FIRST_CORRUPT: u64 = 0x28;
    /// The longest time between two looks at the clock, in microseconds.
    pub const GAP: u64 = 0x30;
    /// The clock at the last look, 32 bits.
    pub const LAST: u64 = 0x38;
    /// The newest request to forget the gap that was met, 16 bits.
    pub const RESET_SEEN: u64 = 0x40;
    /// The newest request to verify that was begun, 16 bits.
    pub const VERIFY_SEEN: u64 = 0x48;
    /// The newest request to verify that was met.
    pub const VERIFY_DONE: u64 = 0x50;
    /// The heartbeats that the writes were paced by so far.
    pub const PACED: u64 = 0x58;
    /// Cycles that have not written each of their pages once.
    pub const WARMING: u64 = 0x60;
    /// The vCPU's number.
    pub const CPU: u64 = 0x68;
    /// The number of vCPUs.
    pub const VCPUS: u64 = 0x70;
    /// The heartbeat to print at next.
    pub const PRINT_AT: u64 = 0x78;
    /// The cycle that is being verified, or 0.
    pub const WALK: u64 = 0x80;
    /// 0 in its pages of the present pass, 1 in those of the one before.
    pub const WALK_PHASE: u64 = 0x88;
    /// The next page of the walk.
    pub const WALK_POSITION: u64 = 0x90;
    /// That page's checksum.
    pub const WALK_CHECKSUM: u64 = 0x98;
    /// That page's sequence number.
    pub const WALK_SEQUENCE: u64 = 0xa0;
    /// Pages left in this phase of the walk.
    pub const WALK_LEFT: u64 = 0xa8;
    /// The first cycle.
    pub const CYCLE_0: u64 = 0x100;
    /// The second cycle; it has 0 pages when the program has one.
    pub const CYCLE_1: u64 = 0x180;
}

/// A cycle: pages of the window that are visited in a fixed order, each once a pass. Offsets from the cycle's start.
pub mod cycle {
    /// The address of its first page.
    pub const BASE: u64 = 0x00;
    /// The first address after its last page.
    pub const END: u64 = 0x08;
    /// Its length in bytes.
    pub const SPAN: u64 = 0x10;
    /// `SPAN * K2`.
    pub const SPAN_CHECKSUM: u64 = 0x18;
    /// How far a page is from the one before it in the order, in bytes; has no factor in common with the pages.
    pub const STEP: u64 = 0x20;
    /// `STEP * K2`.
    pub const STEP_CHECKSUM: u64 = 0x28;
    /// The next page.
    pub const POSITION: u64 = 0x30;
    /// The checksum that it has to have (in the first pass: that it will have).
    pub const CHECKSUM: u64 = 0x38;
    /// The number of this pass, which the pages get; the first is 1, goes page after page, and finds pages of zeros.
    pub const SEQUENCE: u64 = 0x40;
    /// `BASE * K2`.
    pub const BASE_CHECKSUM: u64 = 0x48;
    /// Pages left in this pass.
    pub const LEFT: u64 = 0x50;
    /// Its pages.
    pub const PAGES: u64 = 0x58;
    /// What it may write per tick, in 1/65536 of a page.
    pub const QUOTA: u64 = 0x60;
    /// What is left of it, in the same unit.
    pub const BUDGET: u64 = 0x68;
    /// Pages to write at most at a time.
    pub const CHUNK: u64 = 0x70;
}
