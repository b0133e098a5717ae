//! Watching a move from both ends: shows progress, starts a killed process again, and gathers how it ended.

use std::time::{Duration, Instant};

use crossbeam_channel::select;

use crate::host::holder::protocol::{Arrived, Command, Event, MoveProgress, Moved};
use crate::host::progress::{Progress, ProgressState};
use crate::host::supervise::HolderProcess;
use crate::units::RoundId;

/// A move that takes longer than that hangs; the machines' own patience is far shorter.
const LONGEST: Duration = Duration::from_secs(3600);
/// How long the other end may still have something to say when one has ended. It may have to wait for its own doubt.
const AFTER_ONE_END: Duration = Duration::from_secs(75);

/// How a move ended, as far as each end could tell.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) moved: Option<Moved>,
    pub(super) arrived: Option<Arrived>,
    /// Whether the guest runs at the source again, once a move that had ended in doubt was settled.
    pub(super) settled_here: Option<bool>,
    /// What was noticed from outside: a process that was killed, what became of it.
    pub(super) noticed: Vec<String>,
    /// The source process was killed and its guest with it, unless the destination has it.
    pub(super) source_killed: bool,
    /// The destination process was killed.
    pub(super) destination_killed: bool,
}

impl Ends {
    /// Whether the guest is alive at the destination.
    pub(super) fn runs_at_destination(&self) -> bool {
        self.arrived.as_ref().is_some_and(|arrived| arrived.running) && !self.destination_killed
    }
}

/// Watches until both ends have said how it ended, or cannot any more.
pub(super) fn until_both_end(
    from: &mut HolderProcess,
    to: &mut HolderProcess,
    progress: &mut Progress,
) -> Ends {
    let mut ends = Ends::default();
    let mut deadline = Instant::now() + LONGEST;
    loop {
        let in_doubt = ends.moved.as_ref().is_some_and(|moved| moved.outcome == "in_doubt");
        let source_said = ends.moved.is_some() && (!in_doubt || ends.settled_here.is_some());
        let source_over = source_said || ends.source_killed;
        let destination_over = ends.arrived.is_some() || ends.destination_killed;
        if source_over && destination_over {
            return ends;
        }
        if ends.moved.is_some() || source_over || destination_over {
            deadline = deadline.min(Instant::now() + AFTER_ONE_END);
        }
        let (source_events, destination_events) = (from.events().clone(), to.events().clone());
        select! {
            recv(source_events) -> event => match event {
                Ok(Event::Progress(state)) => progress.update(&progress_state(state)),
                Ok(Event::Moved(moved)) => ends.moved = Some(*moved),
                Ok(Event::Settled { here }) => ends.settled_here = Some(here),
                Ok(Event::Failed { why }) => {
                    ends.noticed.push(why);
                    return ends;
                }
                Ok(_) => {}
                Err(_) => {
                    ends.source_killed = true;
                    restart(from, &mut ends);
                    // Nothing was committed, so the guest died with its process: the destination need not wait for it.
                    if from.recovered().is_empty() {
                        let _ = to.tell(&Command::Cancel);
                    }
                }
            },
            recv(destination_events) -> event => match event {
                Ok(Event::Arrived(arrived)) => ends.arrived = Some(*arrived),
                Ok(Event::Failed { why }) => ends.noticed.push(why),
                Ok(_) => {}
                Err(_) => {
                    ends.destination_killed = true;
                    restart(to, &mut ends);
                }
            },
            default(deadline.saturating_duration_since(Instant::now())) => return ends,
        }
    }
}

/// A supervisor starts what was killed again in its place: the new process knows from the journal what the old one did.
fn restart(holder: &mut HolderProcess, ends: &mut Ends) {
    ends.noticed.push(holder.ended().to_string());
    match holder.restart() {
        Ok(()) => {
            ends.noticed.push(format!("the {} process was started again", holder.name()));
            // A source asks its peer about what was committed as it starts, and says so before anything else.
            let _ = holder.wait_for(Duration::from_millis(200), |_| None::<()>);
            ends.noticed.extend(holder.recovered().iter().map(|(what, _)| format!("recovered: {what}")));
        }
        Err(error) => ends.noticed.push(crate::engine::chain(&error)),
    }
}

fn progress_state(state: MoveProgress) -> ProgressState {
    // Only while pages travel are a round and its rate worth a place on the line.
    let copying = ["pre-copy", "stop-and-copy"].contains(&state.phase.as_str());
    ProgressState {
        phase: state.phase,
        mode: Some(state.mode),
        interfaces: state.interfaces,
        round: copying.then_some(RoundId(state.round)),
        rate_bytes_per_second: copying.then_some(state.bytes_per_second),
        remaining_bytes: copying.then_some(state.remaining_bytes),
        expected_downtime: state.expected_downtime.filter(|_| copying).map(Duration::from_secs_f64),
        note: state.note,
    }
}
