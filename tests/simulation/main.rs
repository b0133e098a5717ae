//! The migration core in simulation: both machines, with the session's own queue and the control link's own accounting, over
//! a network that drops, duplicates, delays, reorders across channels and cuts; hosts that crash and come back; and a guest
//! whose every write counts.
//!
//! After every step: never two running, and what resumes has every page as it was at the pause. At the end, when the
//! network is whole and both hosts are up: never none, unless the process that held the only guest was killed.
//!
//! A failing schedule prints its seed; `PAGEFERRY_SIM_SEED=n cargo nextest run simulation` runs that one alone.

#![allow(clippy::panic, reason = "a test")]

mod faults;
mod guest;
mod hosts;
mod link;
mod network;
mod random;
mod world;

use faults::{Fault, FaultAt};
use random::Random;
use world::{End, World};

/// Seeded random schedules, with several faults each.
const SCHEDULES: u64 = 100_000;

#[test]
fn a_migration_without_faults_completes() {
    for seed in 0..200 {
        let mut world = World::new(seed, vec![]);
        assert_eq!(world.run(), End::AtDestination, "{:#?}", world.trace());
    }
}

/// Every fault before every step of the same schedules: handover messages are among the steps, so each is hit.
#[test]
fn any_single_fault_at_any_step_leaves_exactly_one_guest() {
    let mut ends = std::collections::BTreeMap::new();
    for seed in 0..12 {
        let mut clean = World::new(seed, vec![]);
        clean.run();
        for step in 0..=clean.steps() {
            for fault in Fault::ALL {
                let end = World::new(seed, vec![FaultAt { step, fault }]).run();
                *ends.entry((fault, end)).or_insert(0u32) += 1;
            }
        }
    }
    for fault in Fault::ALL {
        let seen: Vec<_> =
            ends.iter().filter(|((of, _), _)| *of == fault).map(|((_, end), n)| (end, n)).collect();
        println!("{fault:?}: {seen:?}");
    }
    // The runs are worth something only when faults bite: each must have changed the end of some run, and none all.
    for fault in Fault::ALL.into_iter().filter(|fault| fault.ends_a_migration()) {
        assert!(
            ends.keys().any(|(of, end)| *of == fault && *end != End::AtDestination),
            "{fault:?} never bit"
        );
    }
    for fault in Fault::ALL {
        let survived = ends.keys().any(|(of, end)| *of == fault && *end != End::LostByCrash);
        assert!(survived, "{fault:?} was never survived");
    }
}

/// As above, with a second fault soon after the first: a crash while recovering, a cut while asking.
#[test]
fn two_faults_at_the_handover_leave_exactly_one_guest() {
    for seed in 0..3 {
        let mut clean = World::new(seed, vec![]);
        clean.run();
        let handover = clean.handover_began().expect("a clean run hands over");
        for step in handover..=clean.steps() {
            for first in Fault::ALL {
                for second in Fault::ALL {
                    for later in [1, 3, 8] {
                        let faults = vec![
                            FaultAt { step, fault: first },
                            FaultAt { step: step + later, fault: second },
                        ];
                        World::new(seed, faults).run();
                    }
                }
            }
        }
    }
}

#[test]
fn random_schedules_leave_exactly_one_guest() {
    let schedules = match std::env::var("PAGEFERRY_SIM_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("PAGEFERRY_SIM_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SCHEDULES,
    };
    println!("seeds {schedules:?}");
    let mut ends = std::collections::BTreeMap::new();
    for seed in schedules.clone() {
        let mut random = Random::new(seed ^ 0x5eed);
        let faults = (0..random.below(4))
            .map(|_| FaultAt { step: random.below(300) as u32, fault: *random.pick(&Fault::ALL) })
            .collect();
        *ends.entry(World::new(seed, faults).run()).or_insert(0u64) += 1;
    }
    println!("{ends:?}");
    if schedules.end - schedules.start > 1 {
        for end in [End::AtDestination, End::AtSource, End::LostByCrash] {
            assert!(ends.contains_key(&end), "no schedule ended {end:?}: the simulation does not reach it");
        }
    }
}

/// The checks themselves must be able to fail: a source that resumes although nobody said Fenced is noticed.
#[test]
#[should_panic(expected = "two guests run")]
fn a_source_that_takes_silence_for_fenced_is_caught() {
    for seed in 0..20 {
        for step in 30..250 {
            let faults = [Fault::LoseQuestions, Fault::LoseLinkSilently].map(|fault| FaultAt { step, fault });
            World::new(seed, faults.to_vec()).with_hasty_source().run();
        }
    }
}

/// A source that reads pages before it drains the tracker loses writes; the page check must see it.
#[test]
#[should_panic(expected = "differs")]
fn a_tracker_that_is_cleared_late_is_caught() {
    for seed in 0..2000 {
        World::new(seed, vec![]).with_late_clear().run();
    }
}
