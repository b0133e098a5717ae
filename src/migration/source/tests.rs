use super::*;
use crate::layout::RamLayout;
use crate::migration::transitions::{MESSAGES, TOKEN, check_table};
use crate::pageset::PageSet;

const PAGES: u64 = 4;
const NOW: Duration = Duration::ZERO;

fn source() -> Source {
    Source::new(SourceConfig {
        setup: Setup {
            name: "guest".into(),
            guest: "model".into(),
            config: vec![],
            layout: RamLayout::flat(PAGES * 4096).unwrap(),
            touched_pages: PAGES,
            mode: "tcp".into(),
            capabilities: vec![],
        },
        limits: Limits::default(),
        patience: Patience::default(),
    })
}

/// A clean migration's inputs, with the phase that each leads to.
fn path() -> Vec<SourceInput> {
    let accept = Accept { secret: [0; 32], capabilities: vec![] };
    let placed =
        |round| SourceInput::Placed(RoundId(round), PlacedStats { pages: PAGES, ..Default::default() });
    vec![
        SourceInput::Begin,
        SourceInput::Message(Message::Accept(accept)),
        SourceInput::ChannelsOpen,
        SourceInput::TrackingStarted(PageSet::full(PAGES)),
        placed(0),
        SourceInput::Drained(PageSet::empty(PAGES)),
        SourceInput::Paused(7),
        SourceInput::StateSaved(vec![1, 2]),
        SourceInput::Drained(PageSet::empty(PAGES)),
        placed(1),
        SourceInput::Message(Message::Ready(TOKEN)),
        SourceInput::Journaled,
        SourceInput::Message(Message::Running(TOKEN)),
        SourceInput::Journaled,
    ]
}

fn after(steps: usize) -> Source {
    let mut source = source();
    for input in path().into_iter().take(steps) {
        source.handle(NOW, input);
    }
    while source.poll_action().is_some() {}
    source
}

fn actions(source: &mut Source) -> Vec<SourceAction> {
    std::iter::from_fn(|| source.poll_action()).collect()
}

fn action_name(action: &SourceAction) -> String {
    match action {
        SourceAction::Send(message) => format!("send {}", message.name()),
        SourceAction::Finished(Outcome::Completed { .. }) => "**completed**".into(),
        SourceAction::Finished(Outcome::RolledBack { .. }) => "**rolled back**".into(),
        SourceAction::Finished(Outcome::InDoubt { .. }) => "**in doubt**".into(),
        SourceAction::Journal(SourceRecord::Committing(_)) => "journal Committing".into(),
        SourceAction::Journal(SourceRecord::Completed(_)) => "journal Completed".into(),
        SourceAction::Journal(SourceRecord::RolledBack(_)) => "journal RolledBack".into(),
        other => {
            let debug = format!("{other:?}");
            let name = &debug[..debug.find('(').unwrap_or(debug.len())];
            // "StartTracking" reads as "start tracking".
            let spaced = name
                .chars()
                .flat_map(|c| c.is_uppercase().then_some(' ').into_iter().chain(c.to_lowercase()));
            spaced.collect::<String>().trim().to_owned()
        }
    }
}

/// What the machine does with every message, with a lost link, a cancel and a timeout, in every phase: as documented.
#[test]
fn the_transition_table_is_as_documented() {
    let mut rows = Vec::new();
    let phases = path().len();
    for steps in 0..=phases {
        let waits_for = after(steps).phase.waits_for();
        let mut others = vec![
            ("link lost", SourceInput::LinkLost("cut".into())),
            ("cancel", SourceInput::Cancel),
            ("failure here", SourceInput::Failed("no".into())),
        ];
        others.extend(MESSAGES.iter().map(|message| (message.name(), SourceInput::Message(message.clone()))));
        for (name, input) in others {
            let mut source = after(steps);
            source.handle(NOW, input);
            rows.push((waits_for, name, actions(&mut source).iter().map(action_name).collect()));
        }
        let mut source = after(steps);
        if let Some(deadline) = source.poll_timeout() {
            source.handle_timeout(deadline);
            rows.push((waits_for, "timeout", actions(&mut source).iter().map(action_name).collect()));
        }
    }
    check_table("source", &rows);
}

#[test]
fn the_journal_is_written_before_commit_is_sent() {
    let mut source = after(10);
    source.handle(NOW, SourceInput::Message(Message::Ready(TOKEN)));
    assert_eq!(actions(&mut source), [SourceAction::Journal(SourceRecord::Committing(TOKEN))]);
    assert!(!source.can_cancel());
    source.handle(NOW, SourceInput::Journaled);
    assert_eq!(actions(&mut source), [SourceAction::Send(Message::Commit(TOKEN))]);
}

#[test]
fn a_word_about_another_token_decides_nothing() {
    let other = Token([1; 16]);
    for message in [Message::Running(other), Message::Fenced(other)] {
        let mut source = after(12);
        source.handle(NOW, SourceInput::Message(message));
        source.handle_timeout(Patience::default().running);
        assert_eq!(source.phase(), PhaseName::InDoubt);
        assert!(!actions(&mut source).iter().any(|action| matches!(action, SourceAction::Resume(_))));
    }
}

#[test]
fn doubt_ends_with_the_answer_or_stays_doubt() {
    let mut source = after(12);
    source.handle(NOW, SourceInput::LinkLost("cut".into()));
    assert_eq!(actions(&mut source), [SourceAction::Query(TOKEN)]);
    source.handle(NOW, SourceInput::Answer(None));
    let mut questions = 0;
    let (now, last) = loop {
        let now = source.poll_timeout().expect("asks again");
        source.handle_timeout(now);
        match actions(&mut source).pop() {
            Some(SourceAction::Query(TOKEN)) => questions += 1,
            other => break (now, other),
        }
    };
    assert_eq!(last, Some(SourceAction::Finished(Outcome::InDoubt { token: TOKEN })));
    assert_eq!((now, questions), (Patience::default().doubt, 119));
}

#[test]
fn fenced_brings_the_right_to_resume_back() {
    let mut source = after(12);
    source.handle(NOW, SourceInput::LinkLost("cut".into()));
    actions(&mut source);
    source.handle(NOW, SourceInput::Answer(Some(Message::Fenced(TOKEN))));
    assert_eq!(actions(&mut source), [SourceAction::Journal(SourceRecord::RolledBack(TOKEN))]);
    source.handle(NOW, SourceInput::Journaled);
    assert!(matches!(actions(&mut source)[..], [SourceAction::Release, SourceAction::Resume(_)]));
    source.handle(NOW, SourceInput::Resumed);
    assert!(matches!(actions(&mut source)[..], [SourceAction::Finished(Outcome::RolledBack { .. })]));
}

#[test]
fn long_state_travels_in_pieces_and_is_counted() {
    let mut source = after(7);
    let state = vec![5; crate::wire::control::STATE_CHUNK_BYTES + 1];
    source.handle(NOW, SourceInput::StateSaved(state));
    let sent = actions(&mut source);
    assert_eq!(sent.iter().filter(|a| matches!(a, SourceAction::Send(Message::State(_)))).count(), 2);
    source.handle(NOW, SourceInput::Drained(PageSet::empty(PAGES)));
    source.handle(NOW, SourceInput::Placed(RoundId(1), PlacedStats::default()));
    let expected = crate::wire::control::STATE_CHUNK_BYTES as u64 + 1;
    assert!(
        actions(&mut source)
            .contains(&SourceAction::Send(Message::Finish { state_bytes: expected, stopped_at: 7 }))
    );
}

#[test]
fn a_destination_that_confirms_nothing_is_given_up_and_one_that_is_slow_is_not() {
    let patience = Patience::default().placing;
    for (steps, resumes) in [(4, false), (9, true)] {
        let mut source = after(steps);
        for part in 1..5 {
            source.handle(patience * part * 9 / 10, SourceInput::Progressed);
            source.handle_timeout(patience * part * 9 / 10 + patience / 2);
            assert_eq!(actions(&mut source), [], "it goes on while pages are confirmed");
        }
        source.handle_timeout(patience * 5);
        let said = actions(&mut source);
        let Some(SourceAction::Send(Message::Abort(cause))) = said.first() else { panic!("{said:?}") };
        assert!(cause.contains("the barrier of"), "{cause}");
        assert_eq!(said.iter().any(|action| matches!(action, SourceAction::Resume(_))), resumes);
    }
}
