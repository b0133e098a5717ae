//! What goes wrong on the way: processes are killed, channels cut, migrations cancelled, each at every phase.

use crate::demo::{Demo, Guest};

const POINTS: [&str; 6] = ["set-up", "pre-copy", "stop-and-copy", "ready", "journaled", "committed"];

fn for_both_guests(flags: impl Fn(&str) -> String, check: impl Fn(&str, &Demo)) {
    for guest in Guest::ALL.into_iter().filter(|guest| guest.is_here()) {
        for point in POINTS {
            let demo = Demo::run(guest, &flags(point));
            println!("{} {point}: {}", guest.name(), demo.report["outcome"]);
            check(point, &demo);
        }
    }
}

/// From the journal entry on, the destination has the guest or gets it: the source that comes back sees to that.
#[test]
fn the_source_is_killed_at_each_phase() {
    for_both_guests(
        |point| format!("--mode tcp --source-fault kill@{point}"),
        |point, demo| match point {
            "journaled" | "committed" => {
                demo.check("outcome", "completed");
                demo.check("guest_check", "ok");
            }
            _ => {
                demo.check("outcome", "rolled_back");
                assert_eq!(demo.exit, 1);
                assert!(demo.text("cause").contains("the source process was killed"), "{:#}", demo.report);
            }
        },
    );
}

/// Until its journal says `running` the source gets the guest back; after that the guest was the destination's alone.
#[test]
fn the_destination_is_killed_at_each_phase() {
    for_both_guests(
        |point| format!("--mode compression --destination-fault kill@{point}"),
        |point, demo| match point {
            "journaled" | "committed" => {
                demo.check("outcome", "completed");
                let cause = demo.text("cause");
                assert!(cause.contains("its process at the destination was killed"), "{:#}", demo.report);
            }
            _ => demo.check_rolled_back(""),
        },
    );
}

#[test]
fn it_is_cancelled_at_the_source_at_each_phase() {
    for_both_guests(
        |point| format!("--mode compression --source-fault cancel@{point}"),
        |point, demo| match point {
            "journaled" | "committed" => demo.check_completed(),
            _ => demo.check_rolled_back("cancelled"),
        },
    );
}

#[test]
fn it_is_cancelled_at_the_destination_at_each_phase() {
    for_both_guests(
        |point| format!("--mode tcp --destination-fault cancel@{point}"),
        |point, demo| match point {
            "journaled" | "committed" => demo.check_completed(),
            _ => demo.check_rolled_back(""),
        },
    );
}

/// The source has given the guest away and hears nothing for longer than it waits: it asks, until the answer comes.
#[test]
fn a_destination_that_stands_still_after_it_decided_is_asked_until_it_answers() {
    for guest in Guest::ALL.into_iter().filter(|guest| guest.is_here()) {
        let demo = Demo::run(guest, "--mode tcp --destination-fault stall:9@journaled");
        demo.check_completed();
        let warned = demo.report["warnings"].to_string();
        assert!(warned.contains("asked, and got no answer"), "{warned}");
        assert!(demo.report["downtime_seconds"].as_f64() > Some(8.0), "{:#}", demo.report);
    }
}

#[test]
fn one_channel_of_three_is_cut_within_a_round() {
    for guest in Guest::ALL.into_iter().filter(|guest| guest.is_here()) {
        for mode in ["tcp", "compression"] {
            // Behind the first thing that it sends, of which it always has one in a round: its part may be next to nothing.
            let demo = Demo::run(guest, &format!("--mode {mode} --channels 3 --source-fault cut:1@0"));
            demo.check_completed();
            let warned = demo.report["warnings"].to_string();
            assert!(warned.contains("channel 1") && warned.contains("the others carry on"), "{warned}");
        }
    }
}

#[test]
fn the_last_channel_is_cut_and_the_guest_goes_on_at_the_source() {
    for guest in Guest::ALL.into_iter().filter(|guest| guest.is_here()) {
        let demo = Demo::run(guest, "--mode tcp --channels 1 --source-fault cut:0@5000000");
        demo.check_rolled_back("the last channel is lost");
    }
}
