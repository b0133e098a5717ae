//! The controller against a simulated wire: a sender's CPU, a socket buffer, a link, and a destination.

use super::*;

const BATCH: u64 = 1 << 20;

/// What compression does to the data: seconds per byte and bytes left of a byte, for each of [`LEVELS`].
type Data = [(f64, f64); LEVELS.len()];

/// What zstd shows on those pages of a running system that shrink.
const COMPRESSIBLE: Data =
    [(0.95e-9, 0.48), (1.2e-9, 0.41), (1.5e-9, 0.36), (2.6e-9, 0.34), (7.0e-9, 0.33), (12.0e-9, 0.325)];
const INCOMPRESSIBLE: Data =
    [(0.5e-9, 1.0), (0.6e-9, 1.0), (0.8e-9, 1.0), (1.5e-9, 1.0), (8.0e-9, 1.0), (14.0e-9, 1.0)];

struct Wire {
    /// Bytes a second.
    rate: f64,
    /// Seconds of CPU to hand a byte over.
    send_cost: f64,
    /// Seconds the destination takes for a byte of pages that arrived compressed.
    unpack_cost: f64,
    queued: f64,
    /// Bytes of pages per byte in the queue; above 1 when they are compressed.
    expansion: f64,
    clock: f64,
    /// Bytes that the sender's buffer holds.
    buffer: f64,
    /// Seconds that went into compressing.
    compressing: f64,
}

impl Wire {
    fn new(rate: f64) -> Self {
        Self {
            rate,
            send_cost: 0.1e-9,
            unpack_cost: 0.7e-9,
            queued: 0.0,
            expansion: 1.0,
            clock: 0.0,
            buffer: 4e6,
            compressing: 0.0,
        }
    }

    fn drain_rate(&self) -> f64 {
        if self.expansion > 1.0 {
            self.rate.min(1.0 / (self.unpack_cost * self.expansion))
        } else {
            self.rate
        }
    }

    fn pass(&mut self, seconds: f64) -> f64 {
        let drained = (seconds * self.drain_rate()).min(self.queued);
        self.queued -= drained;
        self.clock += seconds;
        drained
    }

    /// Sends one batch as the plan says; answers what the controller is told.
    fn send(&mut self, data: &Data, plan: Plan, controller: &mut LevelController) {
        for &level in plan.sample {
            let (cost, ratio) = data[arm_of(level).unwrap()];
            let page_bytes = SAMPLE_PAGES * 4096;
            self.pass(cost * page_bytes as f64);
            let packed_bytes = (page_bytes as f64 * ratio) as u64;
            let seconds = cost * page_bytes as f64;
            controller.sampled(Sample { level, page_bytes, packed_bytes, seconds, spent_seconds: seconds });
        }
        let (begin, mut drained) = (self.clock, 0.0);
        let (cost, ratio) = match plan.choice {
            Choice::Raw => (0.0, 1.0),
            Choice::Level(level) => data[arm_of(level).unwrap()],
        };
        let probed = if plan.probe && plan.choice != Choice::Raw {
            data[0].0 * (SAMPLE_PAGES * 4096) as f64
        } else {
            0.0
        };
        let whole = if plan.probe && ratio > 0.9 { 0.0 } else { cost * BATCH as f64 };
        let compress_seconds = probed + whole;
        self.compressing += compress_seconds;
        drained += self.pass(compress_seconds);
        let (starved, pushed, before) = (self.queued == 0.0, self.clock, drained);
        let ratio = if ratio > 0.9 { 1.0 } else { ratio };
        let wire_bytes = BATCH as f64 * ratio;
        self.expansion = 1.0 / ratio;
        self.queued += wire_bytes;
        drained += self.pass(wire_bytes * self.send_cost);
        if self.queued > self.buffer {
            // The kernel wakes whoever waits when a third is free (`sk_stream_is_writeable`), and so in thirds.
            let third = self.buffer / 3.0;
            let wait = ((self.queued - self.buffer) / third).ceil() * third / self.drain_rate();
            drained += self.pass(wait);
        }
        controller.sent(Sent {
            choice: plan.choice,
            page_bytes: BATCH,
            wire_bytes: wire_bytes as u64,
            compress_seconds,
            compress_cpu_seconds: compress_seconds,
            seconds: self.clock - begin,
            drained_bytes: Some(drained as u64),
            taken: if starved {
                Taken { bytes: (drained - before) as u64, from: pushed, until: self.clock }
            } else {
                Taken { bytes: drained as u64, from: begin, until: self.clock }
            },
        });
    }

    /// Bytes of pages a second over `batches`, all of them handed to the destination.
    fn run(
        &mut self,
        batches: u64,
        mut data: impl FnMut(u64) -> Data,
        controller: &mut LevelController,
    ) -> f64 {
        let begin = self.clock;
        for batch in 0..batches {
            let queued = Queued { bytes: Some(self.queued as u64), held_seconds: 0.0, sharing: 1 };
            let plan = controller.plan(BATCH, queued);
            self.send(&data(batch), plan, controller);
        }
        self.pass(self.queued / self.drain_rate());
        (batches * BATCH) as f64 / (self.clock - begin)
    }

    fn throughput(rate: f64, batches: u64, data: Data) -> (f64, LevelController) {
        let mut controller = LevelController::new(Findings::default());
        let throughput = Self::new(rate).run(batches, |_| data, &mut controller);
        (throughput, controller)
    }

    fn fixed(rate: f64, data: Data, choice: Choice) -> f64 {
        let mut wire = Self::new(rate);
        for _ in 0..1000 {
            wire.send(
                &data,
                Plan { choice, sample: &[], probe: false },
                &mut LevelController::new(Findings::default()),
            );
        }
        wire.pass(wire.queued / wire.drain_rate());
        1000.0 * BATCH as f64 / wire.clock
    }
}

#[test]
fn a_fast_wire_stays_raw() {
    for data in [COMPRESSIBLE, INCOMPRESSIBLE] {
        let (throughput, controller) = Wire::throughput(4e9, 4000, data);
        assert_eq!(controller.choice(), Choice::Raw);
        let raw = Wire::fixed(4e9, data, Choice::Raw);
        assert!(throughput > 0.97 * raw, "{throughput:.3e} of {raw:.3e}");
    }
}

#[test]
fn a_short_move_over_a_fast_wire_loses_next_to_nothing() {
    for slowness in [1.0, 3.0] {
        let data = COMPRESSIBLE.map(|(cost, ratio)| (cost * slowness, ratio));
        let (throughput, _) = Wire::throughput(2.5e9, 200, data);
        let raw = Wire::fixed(2.5e9, data, Choice::Raw);
        assert!(throughput > 0.97 * raw, "{throughput:.3e} of {raw:.3e}");
    }
}

#[test]
fn a_slow_wire_gets_as_much_as_the_level_that_is_best_for_it() {
    for rate in [12.5e6, 125e6, 300e6] {
        let (throughput, controller) = Wire::throughput(rate, 1000, COMPRESSIBLE);
        let best = LEVELS.map(|level| Wire::fixed(rate, COMPRESSIBLE, Choice::Level(level)));
        let best = best.into_iter().fold(0.0, f64::max);
        assert!(throughput > 0.85 * best, "at {rate:.1e}: {throughput:.3e} of {best:.3e}, {controller:?}");
    }
}

#[test]
fn a_slow_processor_and_a_slow_wire_share_the_work() {
    // Alone, each of them takes as long as the other: 8 ms a batch.
    let data = COMPRESSIBLE.map(|(cost, ratio)| (cost * 8.0, ratio));
    let (throughput, controller) = Wire::throughput(125e6, 1000, data);
    // A third goes as it is, and the others are compressed meanwhile: 5.4 ms a batch.
    let best = 125e6 * 1.54;
    assert!(throughput > 0.93 * best, "{throughput:.3e} of {best:.3e}, {controller:?}");
}

#[test]
fn a_small_buffer_does_not_keep_a_slow_wire_from_it() {
    for buffer in [0.2e6, 0.5e6] {
        let mut wire = Wire { buffer, ..Wire::new(62e6) };
        let mut controller = LevelController::new(Findings::default());
        let throughput = wire.run(1000, |_| COMPRESSIBLE, &mut controller);
        assert!(throughput > 1.9 * 62e6, "{throughput:.3e}, {controller:?}");
    }
}

#[test]
fn a_gigabit_is_worth_twice_as_much_within_a_gibibyte() {
    let (throughput, _) = Wire::throughput(125e6, 1024, COMPRESSIBLE);
    assert!(throughput > 2.0 * 125e6, "{throughput:.3e}");
}

#[test]
fn incompressible_data_goes_raw_at_any_rate() {
    for rate in [12.5e6, 125e6, 1.25e9, 6e9] {
        let (mut wire, mut controller) = (Wire::new(rate), LevelController::new(Findings::default()));
        let throughput = wire.run(2000, |_| INCOMPRESSIBLE, &mut controller);
        let busy = wire.compressing / wire.clock;
        assert!(busy < 0.03, "at {rate:.1e} {busy} of the processor looks for what shrinks");
        let raw = Wire::fixed(rate, INCOMPRESSIBLE, Choice::Raw);
        assert!(throughput > 0.97 * raw, "at {rate:.1e}: {throughput:.3e} of {raw:.3e}");
    }
}

#[test]
fn no_wire_and_no_data_make_it_much_slower_than_raw() {
    for tenths in 0..=10 {
        let ratio = f64::from(tenths) / 10.0;
        for slowness in [0.3, 1.0, 4.0] {
            let data = COMPRESSIBLE.map(|(cost, best)| (cost * slowness, best + (1.0 - best) * ratio));
            for rate in [50e6, 125e6, 300e6, 600e6, 1.2e9, 2.5e9, 6e9] {
                let (throughput, controller) = Wire::throughput(rate, 1500, data);
                let raw = Wire::fixed(rate, data, Choice::Raw);
                assert!(
                    throughput > 0.95 * raw,
                    "ratio +{ratio} slowness {slowness} rate {rate:.1e}: {throughput:.3e} of {raw:.3e}, {controller:?}"
                );
            }
        }
    }
}

#[test]
fn a_destination_that_unpacks_slowly_is_noticed() {
    let mut wire = Wire::new(1.0e9);
    wire.unpack_cost = 3e-9;
    let mut controller = LevelController::new(Findings::default());
    let data = COMPRESSIBLE.map(|(cost, ratio)| (cost / 4.0, ratio));
    let throughput = wire.run(3000, |_| data, &mut controller);
    assert!(throughput > 0.95 * 1.0e9, "{throughput:.3e}, {controller:?}");
}

#[test]
fn data_that_changes_is_followed() {
    let mut controller = LevelController::new(Findings::default());
    let mut wire = Wire::new(125e6);
    for data in [COMPRESSIBLE, INCOMPRESSIBLE, COMPRESSIBLE] {
        let throughput = wire.run(500, |_| data, &mut controller);
        let gain = if data == COMPRESSIBLE { 1.9 } else { 0.97 };
        assert!(throughput > gain * 125e6, "{throughput:.3e}, {controller:?}");
    }
}

/// A guest's RAM as it is: stretches of what shrinks well, of what hardly needs sending, and of what does not shrink.
fn a_guest(batch: u64) -> Data {
    match batch * 1_103_515_245 % 1009 % 16 {
        0..3 => INCOMPRESSIBLE,
        3..8 => COMPRESSIBLE.map(|(cost, _)| (cost / 3.0, 0.01)),
        _ => COMPRESSIBLE,
    }
}

#[test]
fn a_mixture_is_compressed_where_it_shrinks() {
    // In stretches of any length: batch by batch, and as files lie in memory.
    for stretch in [1, 6, 24] {
        for rate in [30e6, 62e6, 125e6] {
            let mut controller = LevelController::new(Findings::default());
            let data = |batch: u64| a_guest(batch / stretch);
            let throughput = Wire::new(rate).run(400, data, &mut controller);
            // What level 1 makes of it, without finding out.
            let mut fixed = Wire::new(rate);
            for batch in 0..400 {
                let plan = Plan { choice: Choice::Level(1), sample: &[], probe: false };
                fixed.send(&data(batch), plan, &mut LevelController::new(Findings::default()));
            }
            fixed.pass(fixed.queued / fixed.drain_rate());
            let best = (400 * BATCH) as f64 / fixed.clock;
            assert!(
                throughput > 0.8 * best,
                "stretch {stretch} at {rate:.1e}: {throughput:.3e} of {best:.3e}, {controller:?}"
            );
        }
    }
}

#[test]
fn a_mixture_goes_raw_over_a_fast_wire() {
    for stretch in [1, 6, 24] {
        let mut controller = LevelController::new(Findings::default());
        let data = |batch: u64| a_guest(batch / stretch);
        let throughput = Wire::new(4e9).run(4000, data, &mut controller);
        let raw = Wire::fixed(4e9, INCOMPRESSIBLE, Choice::Raw);
        assert!(throughput > 0.95 * raw, "stretch {stretch}: {throughput:.3e} of {raw:.3e}");
    }
}

#[test]
fn a_wire_that_becomes_fast_is_given_raw() {
    let mut controller = LevelController::new(Findings::default());
    let mut wire = Wire::new(125e6);
    wire.run(500, |_| COMPRESSIBLE, &mut controller);
    wire.rate = 5e9;
    let throughput = wire.run(4000, |_| COMPRESSIBLE, &mut controller);
    assert_eq!(controller.choice(), Choice::Raw, "{controller:?}");
    let raw = Wire::fixed(5e9, COMPRESSIBLE, Choice::Raw);
    assert!(throughput > 0.85 * raw, "{throughput:.3e} of {raw:.3e}");
}

/// A batch that is sent without a buffer: what the controller is told, and how long it takes in all.
fn send_without_a_buffer(
    controller: &mut LevelController,
    clock: &mut f64,
    queued: Queued,
    bytes_per_second: f64,
    overlap: f64,
) -> (f64, bool) {
    let plan = controller.plan(BATCH, queued);
    let (cost, ratio) = match plan.choice {
        Choice::Raw => (0.0, 1.0),
        Choice::Level(level) => COMPRESSIBLE[arm_of(level).unwrap()],
    };
    for &level in plan.sample {
        let (cost, ratio) = COMPRESSIBLE[arm_of(level).unwrap()];
        let packed_bytes = (65536.0 * ratio) as u64;
        let seconds = cost * 65536.0;
        controller.sampled(Sample {
            level,
            page_bytes: 65536,
            packed_bytes,
            seconds,
            spent_seconds: seconds,
        });
    }
    let (bytes, compress_seconds) = (BATCH as f64, cost * BATCH as f64);
    let wire_bytes = (bytes * ratio) as u64;
    let seconds = (compress_seconds - overlap).max(0.0) + bytes * ratio / bytes_per_second;
    let from = *clock + if queued.bytes.is_some() { 0.0 } else { compress_seconds };
    *clock += seconds;
    controller.sent(Sent {
        choice: plan.choice,
        page_bytes: BATCH,
        wire_bytes,
        compress_seconds,
        compress_cpu_seconds: compress_seconds,
        seconds,
        drained_bytes: queued.bytes.map(|_| wire_bytes),
        taken: Taken { bytes: wire_bytes, from, until: *clock },
    });
    (seconds, plan.choice != Choice::Raw)
}

#[test]
fn a_wire_that_cannot_tell_its_backlog_still_learns() {
    let (mut controller, mut clock) = (LevelController::new(Findings::default()), 0.0);
    let queued = Queued::default();
    let packed =
        (0..500).filter(|_| send_without_a_buffer(&mut controller, &mut clock, queued, 125e6, 0.0).1).count();
    assert!(packed > 400, "{packed} of 500: {controller:?}");
}

#[test]
fn a_cap_on_the_rate_is_a_queue_too() {
    let mut controller = LevelController::new(Findings::default());
    let (mut packed, mut clock) = (0, 0.0);
    let mut queued = Queued { bytes: Some(0), held_seconds: 0.0, sharing: 1 };
    for _ in 0..500 {
        let (seconds, was_packed) =
            send_without_a_buffer(&mut controller, &mut clock, queued, 125e6, queued.held_seconds);
        queued.held_seconds = seconds;
        packed += u32::from(was_packed);
    }
    assert!(packed > 400, "{packed} of 500: {controller:?}");
}

#[test]
fn a_thread_that_stands_still_once_goes_on_compressing() {
    let (mut controller, mut wire) = (LevelController::new(Findings::default()), Wire::new(62e6));
    wire.run(100, |_| COMPRESSIBLE, &mut controller);
    // Something else had the processor for 100 ms.
    wire.run(1, |_| COMPRESSIBLE.map(|(cost, ratio)| (cost + 1e-7, ratio)), &mut controller);
    let throughput = wire.run(100, |_| COMPRESSIBLE, &mut controller);
    assert!(throughput > 1.9 * 62e6, "{throughput:.3e}, {controller:?}");
}

#[test]
fn channels_of_a_wire_see_its_rate_together() {
    // 125 MB/s, which two channels get in turns of 10 ms, or at once, or one of them alone.
    let turns =
        |n: u32| Taken { bytes: 1_250_000, from: f64::from(n) * 0.01, until: f64::from(n + 1) * 0.01 };
    let at_once =
        |n: u32| Taken { bytes: 625_000, from: f64::from(n / 2) * 0.01, until: f64::from(n / 2 + 1) * 0.01 };
    let alone = |n: u32| Taken { from: f64::from(n) * 0.01 + 0.005, bytes: 625_000, ..turns(n) };
    for taken in [&turns as &dyn Fn(u32) -> Taken, &at_once, &alone] {
        let mut rate = Rate::default();
        (0..64).for_each(|n| rate.add(taken(n), 2.0));
        let measured = 1.0 / rate.seconds_per_byte().unwrap();
        assert!((measured / 125e6 - 1.0).abs() < 0.01, "{measured:.3e}");
    }
}

#[test]
fn what_one_channel_finds_out_another_knows() {
    let findings = Findings::default();
    Wire::new(62e6).run(100, |_| COMPRESSIBLE, &mut LevelController::new(findings.clone()));
    let first = |findings| {
        LevelController::new(findings).plan(BATCH, Queued { bytes: Some(2 << 20), ..Queued::default() })
    };
    assert!(matches!(first(findings.clone()).choice, Choice::Level(_)));
    // Of another wire its rate is to be seen first.
    assert_eq!(first(findings.of_another_wire()).choice, Choice::Raw);
}
