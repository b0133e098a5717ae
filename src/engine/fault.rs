//! Failure injection, as a component: the same faults at exactly the same points, every day, in real processes.
//!
//! Nothing here happens unless a plan says so. The plan comes from a hidden option of the process that holds a guest.

use std::str::FromStr;
use std::time::Duration;

/// A moment in a migration, at either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultPoint {
    /// `Setup` was sent; the skeleton was made.
    SetUp,
    /// Pages of the first round are on their way.
    PreCopy,
    /// The guest was stopped; its state was begun to be loaded.
    StopAndCopy,
    /// `Finish` was sent; `Ready` was sent.
    Ready,
    /// The journal has `Committing`; the journal has `Running`.
    Journaled,
    /// `Commit` was sent; the guest runs and `Running` was not sent.
    Committed,
    /// It is over.
    Finished,
}

impl FaultPoint {
    /// Every point, in order.
    pub const ALL: [Self; 7] = [
        Self::SetUp,
        Self::PreCopy,
        Self::StopAndCopy,
        Self::Ready,
        Self::Journaled,
        Self::Committed,
        Self::Finished,
    ];

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SetUp => "set-up",
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Ready => "ready",
            Self::Journaled => "journaled",
            Self::Committed => "committed",
            Self::Finished => "finished",
        }
    }
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// This process kills itself as `kill -9` does.
    Kill,
    /// The operator cancels.
    Cancel,
    /// This end stands still, with every connection open, for that long.
    Stall(Duration),
}

/// What is to go wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// At which point, and what.
    pub at: Option<(FaultPoint, FaultKind)>,
    /// Whether this host says that it has no memory.
    pub no_memory: bool,
    /// The channel that is cut, and after how many bytes.
    pub cut: Option<(usize, u64)>,
}

/// A plan that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no fault; say kill@POINT, cancel@POINT, stall:SECONDS@POINT or cut:CHANNEL@BYTES or no-memory@set-up, where POINT is one of {points}", points = FaultPoint::ALL.map(FaultPoint::name).join(", "))]
pub struct FaultPlanError(String);

impl FromStr for FaultPlan {
    type Err = FaultPlanError;

    fn from_str(text: &str) -> Result<Self, FaultPlanError> {
        let parse = || {
            let (what, at) = text.split_once('@')?;
            if text == "no-memory@set-up" {
                return Some(Self { no_memory: true, ..Self::default() });
            }
            if let Some(channel) = what.strip_prefix("cut:") {
                return Some(Self {
                    cut: Some((channel.parse().ok()?, at.parse().ok()?)),
                    ..Self::default()
                });
            }
            let point = FaultPoint::ALL.into_iter().find(|point| point.name() == at)?;
            let kind = match what {
                "kill" => FaultKind::Kill,
                "cancel" => FaultKind::Cancel,
                _ => FaultKind::Stall(Duration::from_secs(what.strip_prefix("stall:")?.parse().ok()?)),
            };
            Some(Self { at: Some((point, kind)), ..Self::default() })
        };
        parse().ok_or_else(|| FaultPlanError(text.to_owned()))
    }
}

impl FaultPlan {
    /// To be called when a point is reached. Answers whether the operator cancels here.
    #[must_use]
    pub fn reached(&mut self, point: FaultPoint) -> bool {
        let Some((_, kind)) = self.at.take_if(|(at, _)| *at == point) else { return false };
        tracing::warn!(point = point.name(), ?kind, "injecting a fault");
        match kind {
            FaultKind::Kill => {
                let _ =
                    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                false
            }
            FaultKind::Cancel => true,
            FaultKind::Stall(time) => {
                std::thread::sleep(time);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read() {
        let kill = FaultPlan { at: Some((FaultPoint::Ready, FaultKind::Kill)), ..FaultPlan::default() };
        assert_eq!("kill@ready".parse(), Ok(kill));
        let stall = FaultKind::Stall(Duration::from_secs(3));
        let stall = FaultPlan { at: Some((FaultPoint::SetUp, stall)), ..FaultPlan::default() };
        assert_eq!("stall:3@set-up".parse(), Ok(stall));
        assert_eq!("cut:1@4096".parse(), Ok(FaultPlan { cut: Some((1, 4096)), ..FaultPlan::default() }));
        assert_eq!("no-memory@set-up".parse(), Ok(FaultPlan { no_memory: true, ..FaultPlan::default() }));
        for wrong in ["", "kill", "kill@never", "cut:x@1", "stall:@ready", "die@ready"] {
            let said = wrong.parse::<FaultPlan>().unwrap_err().to_string();
            assert!(said.contains("stop-and-copy") && said.starts_with(&format!("{wrong:?}")), "{said}");
        }
    }
}
