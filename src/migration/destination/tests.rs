use super::*;
use crate::migration::transitions::{MESSAGES, TOKEN, check_table};

const NOW: Duration = Duration::ZERO;

fn destination() -> Destination {
    Destination::new(DestinationConfig {
        token: TOKEN,
        secret: [3; 32],
        capabilities: vec![],
        setup_within: Duration::from_secs(30),
        fence_after: Duration::from_secs(60),
    })
}

/// A clean migration's inputs, with what the destination waits for before each.
fn path() -> Vec<(&'static str, DestinationInput)> {
    let finish = Message::Finish { state_bytes: 2, stopped_at: 7 };
    vec![
        ("Setup", DestinationInput::Message(MESSAGES[0].clone())),
        ("the guest's skeleton", DestinationInput::GuestMade),
        ("pages and state", DestinationInput::Message(Message::State(vec![1, 2]))),
        ("pages, state or Finish", DestinationInput::Message(finish)),
        ("the state to be loaded", DestinationInput::StateLoaded),
        ("Commit", DestinationInput::Message(Message::Commit(TOKEN))),
        ("the journal", DestinationInput::Decided(Decision::Running)),
        ("the guest to run", DestinationInput::Resumed),
    ]
}

fn after(steps: usize) -> Destination {
    let mut destination = destination();
    for (_, input) in path().into_iter().take(steps) {
        destination.handle(NOW, input);
    }
    while destination.poll_action().is_some() {}
    destination
}

fn actions(destination: &mut Destination) -> Vec<DestinationAction> {
    std::iter::from_fn(|| destination.poll_action()).collect()
}

fn action_name(action: &DestinationAction) -> String {
    match action {
        DestinationAction::Send(message) => format!("send {}", message.name()),
        DestinationAction::Answer(message) => format!("answer {}", message.name()),
        DestinationAction::Decide(_, decision) => format!("journal {decision:?}"),
        DestinationAction::Revoke(_) => "journal Fenced instead".into(),
        DestinationAction::MakeGuest(_) => "make guest".into(),
        DestinationAction::LoadState { .. } => "load state".into(),
        DestinationAction::DropGuest => "drop guest".into(),
        DestinationAction::Resume(_) => "resume".into(),
        DestinationAction::Finished(Arrival::Running { .. }) => "**running**".into(),
        DestinationAction::Finished(Arrival::Discarded { .. }) => "**discarded**".into(),
    }
}

/// What the machine does with every message and question, a lost link, a cancel and a failure, in every phase.
#[test]
fn the_transition_table_is_as_documented() {
    let mut rows = Vec::new();
    for steps in 0..=path().len() {
        let waits_for = path().get(steps).map_or("nothing", |(waits_for, _)| waits_for);
        let mut inputs = vec![
            ("link lost", DestinationInput::LinkLost("cut".into())),
            ("cancel", DestinationInput::Cancel),
            ("failure here", DestinationInput::Failed("no".into())),
            ("violation", DestinationInput::Violation("lies".into())),
            ("asked Query", DestinationInput::Asked(Message::Query(TOKEN))),
            ("asked Commit", DestinationInput::Asked(Message::Commit(TOKEN))),
        ];
        inputs.extend(
            MESSAGES.iter().map(|message| (message.name(), DestinationInput::Message(message.clone()))),
        );
        for (name, input) in inputs {
            let mut destination = after(steps);
            destination.handle(NOW, input);
            rows.push((waits_for, name, actions(&mut destination).iter().map(action_name).collect()));
        }
    }
    check_table("destination", &rows);
}

#[test]
fn nothing_runs_before_the_journal_says_so() {
    let mut destination = after(5);
    destination.handle(NOW, DestinationInput::Message(Message::Commit(TOKEN)));
    assert_eq!(actions(&mut destination), [DestinationAction::Decide(TOKEN, Decision::Running)]);
    destination.handle(NOW, DestinationInput::Decided(Decision::Fenced));
    let said = actions(&mut destination);
    assert!(!said.iter().any(|action| matches!(action, DestinationAction::Resume(_))), "{said:?}");
    assert!(said.contains(&DestinationAction::Send(Message::Fenced(TOKEN))));
}

#[test]
fn a_commit_with_another_token_ends_it() {
    let mut destination = after(5);
    destination.handle(NOW, DestinationInput::Message(Message::Commit(Token([1; 16]))));
    assert_eq!(actions(&mut destination), [DestinationAction::Decide(TOKEN, Decision::Fenced)]);
}

#[test]
fn a_question_during_the_decision_is_answered_by_it() {
    let mut destination = after(6);
    destination.handle(NOW, DestinationInput::Asked(Message::Query(TOKEN)));
    assert_eq!(actions(&mut destination), []);
    destination.handle(NOW, DestinationInput::Decided(Decision::Running));
    destination.handle(NOW, DestinationInput::Resumed);
    assert!(actions(&mut destination).contains(&DestinationAction::Answer(Message::Running(TOKEN))));
}

#[test]
fn a_guest_that_cannot_start_is_given_back() {
    let mut destination = after(7);
    destination.handle(NOW, DestinationInput::Failed("no vCPU".into()));
    assert_eq!(actions(&mut destination), [DestinationAction::Revoke(TOKEN)]);
    destination.handle(NOW, DestinationInput::Revoked);
    assert!(actions(&mut destination).contains(&DestinationAction::Send(Message::Fenced(TOKEN))));
}

#[test]
fn a_complete_guest_waits_for_a_silent_source_and_then_gives_up() {
    let mut destination = after(5);
    destination.handle(NOW, DestinationInput::LinkLost("cut".into()));
    assert_eq!(actions(&mut destination), []);
    destination.handle_timeout(Duration::from_secs(59));
    assert_eq!(actions(&mut destination), []);
    destination.handle_timeout(Duration::from_secs(60));
    assert_eq!(actions(&mut destination), [DestinationAction::Decide(TOKEN, Decision::Fenced)]);
}

#[test]
fn state_that_is_not_as_long_as_announced_is_refused() {
    let mut destination = after(3);
    let finish = Message::Finish { state_bytes: 3, stopped_at: 7 };
    destination.handle(NOW, DestinationInput::Message(finish));
    let said = actions(&mut destination);
    let Some(DestinationAction::Send(Message::Abort(cause))) = said.first() else { panic!("{said:?}") };
    assert!(cause.contains("2 bytes of guest state came, 3 were sent"), "{cause}");
}
