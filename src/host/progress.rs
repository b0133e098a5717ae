//! What a person sees while a migration runs: one line on stderr that changes, or plain lines now and then.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::{Bytes, RoundId};

/// How often a plain line is written at most, within one phase.
const PLAIN_INTERVAL: Duration = Duration::from_secs(1);

/// Where a migration stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProgressState {
    /// The phase, in design.md's words: `set up`, `pre-copy`, `switchover`.
    pub phase: String,
    /// The mode that memory travels by, once it is chosen.
    pub mode: Option<String>,
    /// The network interfaces that carry it.
    pub interfaces: Vec<String>,
    /// The round, in pre-copy.
    pub round: Option<RoundId>,
    /// How fast memory travels, once that is measured.
    pub rate_bytes_per_second: Option<u64>,
    /// What this round still has to send.
    pub remaining_bytes: Option<u64>,
    /// How long the guest would stand still if it were paused now.
    pub expected_downtime: Option<Duration>,
    /// What a person should know, such as why it does not converge.
    pub note: Option<String>,
}

impl fmt::Display for ProgressState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.phase)?;
        if let Some(mode) = &self.mode {
            write!(f, ", {mode}")?;
            if !self.interfaces.is_empty() {
                write!(f, " over {}", self.interfaces.join(", "))?;
            }
        }
        if let Some(RoundId(round)) = self.round {
            write!(f, ", round {round}")?;
        }
        if let Some(rate) = self.rate_bytes_per_second {
            write!(f, ", {}/s", Bytes(rate))?;
        }
        if let Some(remaining) = self.remaining_bytes {
            write!(f, ", {} to go", Bytes(remaining))?;
        }
        if let Some(downtime) = self.expected_downtime {
            write!(f, ", expected downtime {} ms", downtime.as_millis())?;
        }
        if let Some(note) = &self.note {
            write!(f, " ({note})")?;
        }
        Ok(())
    }
}

/// Shows the state of a migration on stderr. It never fails: a migration does not end because nobody can watch it.
pub struct Progress(Show);

enum Show {
    /// One line that is drawn anew.
    Bar(ProgressBar),
    /// A line now and then.
    Lines(Lines<Box<dyn Write + Send>>),
    Nothing,
}

impl Progress {
    /// A line that changes when stderr is a terminal, else plain lines. With `json`, whose reader is a program, plain lines
    /// if `verbose` and nothing otherwise.
    #[must_use]
    pub fn on_stderr(json: bool, verbose: bool) -> Self {
        if json && !verbose {
            Self(Show::Nothing)
        } else if !json && io::stderr().is_terminal() {
            Self::bar(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
        } else {
            Self::lines(io::stderr())
        }
    }

    /// One of several lines that change.
    #[must_use]
    pub fn among(several: &MultiProgress) -> Self {
        Self::bar(several.add(ProgressBar::no_length()))
    }

    fn bar(bar: ProgressBar) -> Self {
        // The clock on the line goes on also while nothing is told: a person sees that it is alive.
        bar.enable_steady_tick(Duration::from_millis(200));
        // A line that is too long for the terminal goes on in the next, since what matters most may stand at its end.
        let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        Self(Show::Bar(bar))
    }

    /// Plain lines into `out`.
    #[must_use]
    pub fn lines(out: impl Write + Send + 'static) -> Self {
        Self(Show::Lines(Lines { out: Box::new(out), last: None }))
    }

    /// Shows where it stands. Cheap; may be called as often as there is news.
    pub fn update(&mut self, state: &ProgressState) {
        self.show(&state.phase, state.to_string());
    }

    /// Shows a line; plain lines come once a second, and when the phase is another.
    pub fn show(&mut self, phase: &str, line: String) {
        match &mut self.0 {
            Show::Bar(bar) => {
                bar.set_message(line);
                bar.tick();
            }
            Show::Lines(lines) => lines.show(phase, &line, Instant::now()),
            Show::Nothing => {}
        }
    }

    /// Takes the changing line away, so that what follows stands alone.
    pub fn finish(self) {
        if let Show::Bar(bar) = self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Plain lines: one when the phase changes, else at most one in [`PLAIN_INTERVAL`].
struct Lines<W> {
    out: W,
    last: Option<(Instant, String)>,
}

impl<W: Write> Lines<W> {
    fn show(&mut self, phase: &str, line: &str, now: Instant) {
        let due = self
            .last
            .as_ref()
            .is_none_or(|(at, last)| last != phase || now.saturating_duration_since(*at) >= PLAIN_INTERVAL);
        if due {
            // Nobody reads it any more: not the migration's concern.
            let _ = writeln!(self.out, "{line}");
            self.last = Some((now, phase.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn precopy() -> ProgressState {
        ProgressState {
            phase: "pre-copy".to_owned(),
            mode: Some("tcp".to_owned()),
            interfaces: vec!["eth0".to_owned(), "eth1".to_owned()],
            round: Some(RoundId(3)),
            rate_bytes_per_second: Some(812 << 20),
            remaining_bytes: Some(120 << 20),
            expected_downtime: Some(Duration::from_millis(148)),
            note: None,
        }
    }

    #[test]
    fn a_line_says_everything_that_is_known() {
        assert_eq!(
            precopy().to_string(),
            "pre-copy, tcp over eth0, eth1, round 3, 812 MiB/s, 120 MiB to go, expected downtime 148 ms"
        );
        let note = Some("writes 900 MiB/s, more than the wire carries".to_owned());
        let state = ProgressState { phase: "pre-copy".to_owned(), note, ..ProgressState::default() };
        assert_eq!(state.to_string(), "pre-copy (writes 900 MiB/s, more than the wire carries)");
    }

    #[test]
    fn plain_lines_come_once_a_second_and_at_each_phase() {
        let start = Instant::now();
        let mut lines = Lines { out: Vec::new(), last: None };
        for milliseconds in 0..2500 {
            let state = precopy();
            lines.show(&state.phase, &state.to_string(), start + Duration::from_millis(milliseconds));
        }
        lines.show("switchover", "switchover", start + Duration::from_millis(2501));
        lines.show("switchover", "switchover", start + Duration::from_millis(2502));
        let text = String::from_utf8(lines.out).unwrap();
        let phases: Vec<&str> = text.lines().map(|line| line.split(',').next().unwrap()).collect();
        assert_eq!(phases, ["pre-copy", "pre-copy", "pre-copy", "switchover"]);
    }

    #[test]
    fn a_reader_that_went_away_stops_nothing() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let mut progress = Progress::lines(Closed);
        progress.update(&precopy());
        progress.finish();
    }
}
