//! The source says what it has no right to say, at every stage.

use super::{Host, abort_in};
use crate::cheat::{Cheat, Stage};
use crate::control::nonsense;
use crate::{OTHER, each, every_message};

use pageferry::wire::control::Message;
use pageferry::wire::preamble::{MigrationId, Preamble, Purpose, Secret, Versions};

fn is_due(stage: Stage, message: &Message) -> bool {
    match stage {
        Stage::Connected => matches!(message, Message::Setup(_)),
        Stage::Accepted | Stage::Placed | Stage::StateSent => {
            matches!(message, Message::RoundDone { .. } | Message::State(_) | Message::Finish { .. })
        }
        Stage::Ready => false,
    }
}

#[test]
fn every_message_at_every_stage() {
    for stage in Stage::ALL {
        let wrong = every_message().into_iter().filter(|message| !is_due(stage, message));
        let cases = wrong.map(|message| (format!("{} at {stage:?}", message.name()), message)).collect();
        each(cases, |name, message| {
            let said = match &message {
                Message::Abort(cause) => format!("the source ended the migration: {cause}"),
                _ => format!("the source broke the protocol: it sent {}", message.name()),
            };
            let host = Host::patient();
            let arriving = host.await_one();
            let cheat = Cheat::at(host.address(), stage);
            cheat.control.say(&message);
            arriving.discarded(name, &[&said]);
            let heard = cheat.control.hear_out();
            if stage == Stage::Ready {
                assert!(heard.contains(&Message::Fenced(cheat.token)), "{name}: {heard:?}");
                let asked = cheat.ask(&Message::Commit(cheat.token)).unwrap();
                assert_eq!(asked, Message::Fenced(cheat.token), "{name}: what was burnt stays so");
            } else {
                assert!(abort_in(&heard).is_some_and(|told| told.contains(&said)), "{name}: {heard:?}");
            }
        });
    }
}

#[test]
fn nonsense_at_every_stage() {
    for stage in Stage::ALL {
        let cases = nonsense().into_iter();
        let cases =
            cases.map(|(name, noise, words)| (format!("{name} at {stage:?}"), (noise, words))).collect();
        each(cases, |name, (noise, words)| {
            let mut host = Host::patient();
            // A link that ends there leaves time to come back over another connection.
            host.options.fence_after = std::time::Duration::from_secs(2);
            let arriving = host.await_one();
            let cheat = Cheat::at(host.address(), stage);
            cheat.control.make(&noise);
            arriving.discarded(name, &[words]);
            if stage == Stage::Ready {
                let asked = cheat.ask(&Message::Commit(OTHER)).unwrap();
                assert_eq!(asked, Message::Fenced(OTHER), "{name}");
            }
        });
    }
}

#[test]
fn another_version_is_refused_in_words_that_name_both() {
    let host = Host::patient();
    let arriving = host.await_one();
    for (oldest, newest, words) in
        [(3, 4, ["version 3 to 4", "this side speaks 1"]), (0, 0, ["version 0", "this side speaks 1"])]
    {
        let mut preamble = Preamble::new(Purpose::NewMigration, MigrationId([1; 16]), Secret::NONE);
        preamble.versions = Versions { oldest, newest };
        let (_, text) = crate::cheat::dial(host.address(), &preamble).unwrap_err();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    // It has cost nobody the place.
    let cheat = Cheat::at(host.address(), Stage::Ready);
    cheat.control.say(&Message::Commit(cheat.token));
    arriving.runs("after another version");
}

#[test]
fn a_second_migration_is_refused_while_one_runs() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Placed);
    // Even under the same name.
    for migration in [MigrationId([1; 16]), cheat.migration] {
        let preamble = Preamble::new(Purpose::NewMigration, migration, Secret::NONE);
        let (_, text) = crate::cheat::dial(host.address(), &preamble).unwrap_err();
        assert!(text.contains("busy"), "{text}");
    }
    cheat.control.say(&Message::Abort("enough".into()));
    arriving.discarded("two at once", &["the source ended the migration: enough"]);
}
