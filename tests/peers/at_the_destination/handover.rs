//! Never two, never none: commits and questions at every stage, over the link and beside it.

use super::Host;
use crate::cheat::{Cheat, Stage, ask};
use crate::{OTHER, TOKEN, each};

use pageferry::wire::control::Message;
use pageferry::wire::preamble::{MigrationId, RECEIVED_LIMIT, RefusalCode, Secret};

#[test]
fn an_honest_script_arrives() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    cheat.control.say(&Message::Commit(cheat.token));
    arriving.runs("honest");
    assert_eq!(cheat.control.hear_out(), [Message::Running(cheat.token)]);
    // For ever, and whatever is asked.
    for question in [Message::Query(cheat.token), Message::Commit(cheat.token)] {
        assert_eq!(cheat.ask(&question).unwrap(), Message::Running(cheat.token));
    }
}

#[test]
fn a_wrong_token_burns_the_right_one() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    cheat.control.say(&Message::Commit(OTHER));
    arriving.discarded("a wrong token", &["it sent Commit after Finish, or with a wrong token"]);
    assert_eq!(cheat.control.hear_out(), [Message::Fenced(cheat.token)]);
    for question in [Message::Commit(cheat.token), Message::Query(cheat.token), Message::Commit(OTHER)] {
        let Message::Fenced(_) = cheat.ask(&question).unwrap() else { panic!("{question:?}") };
    }
}

/// Over the link and over a connection of its own: once asked, it never runs.
#[test]
fn a_question_at_ready_is_answered_fenced() {
    let cases = vec![("over the link".to_owned(), true), ("beside the link".to_owned(), false)];
    each(cases, |name, over_the_link| {
        let host = Host::patient();
        let arriving = host.await_one();
        let cheat = Cheat::at(host.address(), Stage::Ready);
        if over_the_link {
            cheat.control.say(&Message::Query(cheat.token));
        } else {
            assert_eq!(
                cheat.ask(&Message::Query(cheat.token)).unwrap(),
                Message::Fenced(cheat.token),
                "{name}"
            );
        }
        cheat.control.say(&Message::Commit(cheat.token));
        arriving.discarded(name, &["the source asked, and the guest had not been committed"]);
        assert_eq!(cheat.control.hear_out(), [Message::Fenced(cheat.token)], "{name}");
        assert_eq!(cheat.ask(&Message::Commit(cheat.token)).unwrap(), Message::Fenced(cheat.token), "{name}");
    });
}

/// A token that nobody was told yet cannot be asked about, and a stranger's question costs the migration nothing.
#[test]
fn a_question_about_another_token_changes_nothing() {
    let cases = Stage::ALL.map(|stage| (format!("asked at {stage:?}"), stage)).to_vec();
    each(cases, |name, stage| {
        let host = Host::patient();
        let arriving = host.await_one();
        let mut cheat = Cheat::connect(host.address());
        let ask_about_another = |cheat: &Cheat| {
            for question in [Message::Query(OTHER), Message::Commit(OTHER)] {
                let Message::Abort(cause) = cheat.ask(&question).unwrap() else {
                    panic!("{name}: {question:?}")
                };
                assert!(cause.contains("of no migration here"), "{name}: {cause}");
            }
        };
        for reached in Stage::ALL {
            match reached {
                Stage::Connected => {}
                Stage::Accepted => cheat.set_up(&crate::cheat::setup()),
                Stage::Placed => cheat.place(),
                Stage::StateSent => {
                    cheat.control.say(&Message::State(crate::guest::state_with(crate::cheat::WRITTEN)));
                }
                Stage::Ready => cheat.finish(),
            }
            if reached == stage {
                ask_about_another(&cheat);
            }
        }
        cheat.control.say(&Message::Commit(cheat.token));
        arriving.runs(name);
    });
}

#[test]
fn what_nobody_holds_is_burnt_when_it_is_asked_about() {
    let host = Host::patient();
    let stranger = MigrationId([3; 16]);
    for question in [Message::Commit(TOKEN), Message::Query(TOKEN)] {
        assert_eq!(ask(host.address(), stranger, &question).unwrap(), Message::Fenced(TOKEN));
    }
    for wrong in [Message::Running(TOKEN), Message::Abort("no".into())] {
        let Message::Abort(cause) = ask(host.address(), stranger, &wrong).unwrap() else {
            panic!("{wrong:?}")
        };
        assert!(cause.contains("only Query and Commit may be asked"), "{cause}");
    }
}

#[test]
fn a_commit_beside_a_lost_link_runs_it() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    cheat.control.close();
    assert_eq!(cheat.ask(&Message::Commit(cheat.token)).unwrap(), Message::Running(cheat.token));
    arriving.runs("a commit beside the link");
    assert_eq!(cheat.ask(&Message::Query(cheat.token)).unwrap(), Message::Running(cheat.token));
}

#[test]
fn commits_from_everywhere_run_it_once() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    let commit = Message::Commit(cheat.token);
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..4).map(|_| scope.spawn(|| cheat.ask(&commit).unwrap())).collect();
        (0..4).for_each(|_| cheat.control.say(&commit));
        for answer in asking {
            assert_eq!(answer.join().unwrap(), Message::Running(cheat.token));
        }
    });
    arriving.runs("commits from everywhere");
}

#[test]
fn a_commit_that_comes_too_late_finds_it_burnt() {
    let host = Host::hasty();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    arriving.discarded("a late commit", &["the source did not commit in time: waited for Commit"]);
    assert_eq!(cheat.control.hear_out(), [Message::Fenced(cheat.token)]);
    assert_eq!(cheat.ask(&Message::Commit(cheat.token)).unwrap(), Message::Fenced(cheat.token));
}

/// The control link outlives its connection, from the moment that there is a secret.
#[test]
fn a_source_that_comes_back_goes_on() {
    let cases = [Stage::Accepted, Stage::Placed, Stage::StateSent, Stage::Ready];
    let cases = cases.map(|stage| (format!("cut at {stage:?}"), stage)).to_vec();
    each(cases, |name, stage| {
        let host = Host::patient();
        let arriving = host.await_one();
        let mut cheat = Cheat::at(host.address(), stage);
        cheat.control.close();
        let heard = cheat.control.heard();
        let refused = cheat.resume(Secret([9; 32]), heard).unwrap_err();
        assert_eq!(refused.0, RefusalCode::WrongSecret, "{name}");
        cheat.resume(cheat.secret, heard).unwrap();
        if stage < Stage::Placed {
            cheat.place();
        }
        if stage < Stage::StateSent {
            cheat.control.say(&Message::State(crate::guest::state_with(crate::cheat::WRITTEN)));
        }
        if stage < Stage::Ready {
            cheat.finish();
        }
        cheat.control.say(&Message::Commit(cheat.token));
        let received = arriving.runs(name);
        let warnings = &received.report.warnings;
        assert!(warnings.iter().any(|warning| warning.contains("goes on over")), "{name}: {warnings:?}");
    });
}

#[test]
fn a_source_that_comes_back_with_wrong_counts_does_not_go_on() {
    let cases = [2, RECEIVED_LIMIT - 1].map(|heard| (format!("says it heard {heard}"), heard)).to_vec();
    each(cases, |name, heard| {
        let host = Host::patient();
        let arriving = host.await_one();
        let mut cheat = Cheat::at(host.address(), Stage::Placed);
        cheat.control.close();
        cheat.resume(cheat.secret, heard).unwrap();
        let count = format!("the peer says that it has {heard} messages; it can have");
        arriving.discarded(name, &["the peer's count of control messages is wrong", &count]);
    });
}
