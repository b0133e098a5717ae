//! Whether another round, the switchover, or giving up: a numbered predicate over measured rates. It reads no clock.
//!
//! 1. Nothing is left to send: stop and copy.
//! 2. What is left takes no longer than the downtime limit: stop and copy.
//! 3. The limit of rounds is reached: it does not converge.
//! 4. [`NO_PROGRESS_ROUNDS`] rounds in a row left no less than the best before them: it does not converge.
//! 5. Otherwise: another round.
//!
//! When it does not converge the host's choice applies: cancel, switch anyway, or throttle the guest one step and go on.

use std::time::Duration;

use crate::units::{Bytes, PAGE_SIZE, RoundId};

/// How many rounds without progress it takes to say that there is none. Two can be bad luck with a bursty guest.
pub const NO_PROGRESS_ROUNDS: u32 = 3;
/// What counts as progress: less than this share of the best so far. 5 % is within the noise of measured rates.
const PROGRESS: f64 = 0.95;
/// The first step of throttling and each further one, as percent of vCPU time (QEMU's cpu-throttle-initial is 20 too).
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
/// The most that is taken from a guest; at 100 it would be a pause without end.
pub const THROTTLE_MOST: u8 = 99;

/// What a host does with a guest that dirties pages faster than they can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNoConvergence {
    /// Give up; the guest goes on at the source.
    #[default]
    Cancel,
    /// Move it anyway, with a longer downtime than the limit.
    Switch,
    /// Take vCPU time from the guest step by step; give up at the last step.
    Throttle,
}

impl OnNoConvergence {
    /// Every choice.
    pub const ALL: [Self; 3] = [Self::Cancel, Self::Switch, Self::Throttle];

    /// The word for it on the command line and in the host file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Switch => "switch",
            Self::Throttle => "throttle",
        }
    }
}

/// The limits that a host sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest downtime that is aimed at.
    pub downtime: Duration,
    /// The most pre-copy rounds.
    pub rounds: u32,
    /// What happens when a guest does not converge.
    pub on_no_convergence: OnNoConvergence,
    /// What the switchover costs besides the last pages: state saved, sent and loaded.
    pub handover_allowance: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            rounds: 30,
            on_no_convergence: OnNoConvergence::Cancel,
            handover_allowance: Duration::from_millis(20),
        }
    }
}

/// What one round did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundRecord {
    /// Which round.
    pub round: RoundId,
    /// Pages that it placed, zero pages among them.
    pub pages: u64,
    /// How many of them held only zero bytes.
    pub zero_pages: u64,
    /// Bytes of guest memory that travelled: the other pages.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took, from the first page to its barrier.
    pub took: Duration,
    /// Pages that the guest dirtied meanwhile.
    pub dirtied: u64,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Rule 5.
    AnotherRound,
    /// Rules 1 and 2, or the host's choice.
    StopAndCopy,
    /// The host's choice: first slow the guest down to leave it this many percent less, then another round.
    Throttle(u8),
    /// The host's choice: end the migration; the text says why it does not converge.
    GiveUp(String),
}

/// Judges after each round.
#[derive(Clone, Debug)]
pub struct Convergence {
    limits: Limits,
    rates: Rates,
    best_left: Option<u64>,
    rounds_without_progress: u32,
    rounds: u32,
    throttle: u8,
    /// Why it does not converge, when that has been found.
    note: Option<String>,
}

impl Convergence {
    /// No round yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            rates: Rates::default(),
            best_left: None,
            rounds_without_progress: 0,
            rounds: 0,
            throttle: 0,
            note: None,
        }
    }

    /// How long the guest would be stopped if `pages` were left to send now; `None` before anything was measured.
    #[must_use]
    pub fn expected_downtime(&self, pages: u64) -> Option<Duration> {
        let seconds = pages as f64 / self.rates.pages_per_second()?;
        Some(
            self.limits.handover_allowance
                + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2),
        )
    }

    /// How much is taken from the guest now, in percent.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Why it does not converge, for the progress line; `None` while it does.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// The verdict after a round, with `left` pages dirtied and not yet sent. Rules as numbered above.
    pub fn judge(&mut self, record: &RoundRecord, left: u64) -> Verdict {
        self.rates.add(record);
        self.rounds += 1;
        let expected = self.expected_downtime(left);
        if left == 0 || expected.is_some_and(|expected| expected <= self.limits.downtime) {
            self.note = None;
            return Verdict::StopAndCopy;
        }
        self.count_progress(left);
        let trouble = if self.rounds >= self.limits.rounds {
            format!("{} rounds are the limit", self.limits.rounds)
        } else if self.rounds_without_progress >= NO_PROGRESS_ROUNDS {
            format!("{NO_PROGRESS_ROUNDS} rounds brought no progress")
        } else {
            return Verdict::AnotherRound;
        };
        let note = format!(
            "the guest does not converge: {trouble}; {left} pages ({}) are left, which would stop it for {} against a \
             limit of {}; it dirties {}/s and {}/s are sent",
            Bytes(left * PAGE_SIZE),
            expected.map_or("an unknown time".into(), |time| format!("{:.3} s", time.as_secs_f64())),
            format_args!("{:.3} s", self.limits.downtime.as_secs_f64()),
            Bytes((record.dirtied * PAGE_SIZE) * 1000 / (record.took.as_millis() as u64).max(1)),
            Bytes((self.rates.pages_per_second().unwrap_or(0.0) * PAGE_SIZE as f64) as u64),
        );
        self.note = Some(note.clone());
        self.choose(&note)
    }

    /// Rule 4's count. Round 0 sets the mark: it sends everything once and can make no progress.
    fn count_progress(&mut self, left: u64) {
        if self.best_left.is_none_or(|best| (left as f64) < best as f64 * PROGRESS) {
            self.best_left = Some(left);
            self.rounds_without_progress = 0;
        } else {
            self.rounds_without_progress += 1;
        }
    }

    fn choose(&mut self, note: &str) -> Verdict {
        match self.limits.on_no_convergence {
            OnNoConvergence::Cancel => Verdict::GiveUp(format!(
                "{note}; raise the downtime limit, or let the host switch or throttle"
            )),
            OnNoConvergence::Switch => Verdict::StopAndCopy,
            OnNoConvergence::Throttle if self.throttle >= THROTTLE_MOST => {
                Verdict::GiveUp(format!("{note}; throttling it by {THROTTLE_MOST} % did not help"))
            }
            OnNoConvergence::Throttle => {
                self.throttle = match self.throttle {
                    0 => THROTTLE_FIRST,
                    percent => (percent + THROTTLE_STEP).min(THROTTLE_MOST),
                };
                // The slower guest gets its own chance to converge; the limit of rounds then counts from here.
                self.rounds_without_progress = 0;
                self.best_left = None;
                self.rounds = 0;
                Verdict::Throttle(self.throttle)
            }
        }
    }
}

/// The rate of the last two rounds together: one alone may be too short to measure, more are stale.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    last: Option<(u64, Duration)>,
    before: Option<(u64, Duration)>,
}

impl Rates {
    fn add(&mut self, record: &RoundRecord) {
        if record.pages > 0 {
            self.before = self.last.replace((record.pages, record.took));
        }
    }

    fn pages_per_second(&self) -> Option<f64> {
        let (pages, took) = self.last?;
        let (more_pages, longer) = self.before.unwrap_or_default();
        // A round of no measurable length counts as a microsecond: fast, not infinitely so.
        Some((pages + more_pages) as f64 / (took + longer).max(Duration::from_micros(1)).as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(pages: u64, milliseconds: u64) -> RoundRecord {
        RoundRecord { pages, took: Duration::from_millis(milliseconds), ..RoundRecord::default() }
    }

    fn limits(on_no_convergence: OnNoConvergence) -> Limits {
        Limits {
            downtime: Duration::from_millis(100),
            rounds: 10,
            on_no_convergence,
            handover_allowance: Duration::ZERO,
        }
    }

    #[test]
    fn rule_1_and_2_stop() {
        let mut rule_1 = Convergence::new(limits(OnNoConvergence::Cancel));
        assert_eq!(rule_1.judge(&record(1000, 1000), 0), Verdict::StopAndCopy);
        let mut rule_2 = Convergence::new(limits(OnNoConvergence::Cancel));
        assert_eq!(rule_2.judge(&record(1000, 1000), 101), Verdict::AnotherRound);
        assert_eq!(rule_2.judge(&record(1000, 1000), 100), Verdict::StopAndCopy);
        assert_eq!(rule_2.expected_downtime(50), Some(Duration::from_millis(50)));
    }

    #[test]
    fn the_allowance_counts() {
        let allowance = Duration::from_millis(60);
        let mut judge =
            Convergence::new(Limits { handover_allowance: allowance, ..limits(OnNoConvergence::Cancel) });
        assert_eq!(judge.judge(&record(1000, 1000), 41), Verdict::AnotherRound);
        assert_eq!(judge.judge(&record(1000, 1000), 40), Verdict::StopAndCopy);
    }

    #[test]
    fn rule_3_limits_the_rounds() {
        let mut judge = Convergence::new(limits(OnNoConvergence::Cancel));
        let mut left = 1_000_000;
        for _ in 0..9 {
            assert_eq!(judge.judge(&record(1000, 1000), left), Verdict::AnotherRound);
            left = left * 9 / 10;
        }
        let Verdict::GiveUp(why) = judge.judge(&record(1000, 1000), left) else { panic!("gives up") };
        assert!(why.contains("10 rounds are the limit"), "{why}");
    }

    #[test]
    fn rule_4_sees_that_there_is_no_progress() {
        let mut judge = Convergence::new(limits(OnNoConvergence::Cancel));
        assert_eq!(judge.judge(&record(9000, 9000), 1000), Verdict::AnotherRound);
        assert_eq!(judge.judge(&record(1000, 1000), 990), Verdict::AnotherRound);
        assert_eq!(judge.judge(&record(1000, 1000), 1010), Verdict::AnotherRound);
        let Verdict::GiveUp(why) = judge.judge(&record(1000, 1000), 960) else { panic!("gives up") };
        assert!(why.contains("3 rounds brought no progress") && why.contains("0.960 s"), "{why}");
        assert_eq!(judge.note().map(|note| why.starts_with(note)), Some(true));
    }

    #[test]
    fn the_host_may_switch_anyway() {
        let mut judge = Convergence::new(Limits { rounds: 1, ..limits(OnNoConvergence::Switch) });
        assert_eq!(judge.judge(&record(1000, 1000), 5000), Verdict::StopAndCopy);
    }

    #[test]
    fn throttling_goes_step_by_step_and_ends() {
        let mut judge = Convergence::new(Limits { rounds: 1, ..limits(OnNoConvergence::Throttle) });
        let mut steps = Vec::new();
        loop {
            match judge.judge(&record(1000, 1000), 5000) {
                Verdict::Throttle(percent) => steps.push(percent),
                Verdict::GiveUp(why) => break assert!(why.contains("99 %"), "{why}"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }
}
