//! Samples, sides and turns: all that the cases have in common.

use serde::{Deserialize, Serialize};

use crate::ratio::{Figures, Goal, Ratio, median};

pub(crate) const GIB: f64 = (1_u64 << 30) as f64;

/// One measurement of one way to move memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Bytes of memory that moved, as the guest sees them.
    pub(crate) bytes: u64,
    /// What crossed the network for it, where it is known.
    pub(crate) wire_bytes: u64,
    pub(crate) seconds: f64,
    /// Processor time of the sending process.
    pub(crate) source_cpu_seconds: f64,
    /// Processor time of the receiving process; 0 where it is not known.
    pub(crate) destination_cpu_seconds: f64,
    /// How long the guest stood still, where one ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_seconds: Option<f64>,
    /// The most that the engine took of memory beyond the RAM, at either end, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) engine_bytes: Option<u64>,
}

impl Sample {
    pub(crate) fn gib_per_second(&self) -> f64 {
        self.bytes as f64 / GIB / self.seconds
    }

    pub(crate) fn source_cpu_per_gib(&self) -> f64 {
        self.source_cpu_seconds * GIB / self.bytes as f64
    }

    pub(crate) fn destination_cpu_per_gib(&self) -> f64 {
        self.destination_cpu_seconds * GIB / self.bytes as f64
    }
}

/// One way, measured some times.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Side {
    /// What it is, in a few words; the key that ratios go by.
    pub(crate) name: String,
    pub(crate) samples: Vec<Sample>,
}

impl Side {
    pub(crate) fn median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(of))
    }

    /// What ratios are made of.
    pub(crate) fn figures(&self, of: impl Fn(&Sample) -> f64) -> Figures {
        Figures(self.samples.iter().map(of).collect())
    }
}

/// What one case came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CaseResult {
    pub(crate) case: String,
    /// What was measured and how it was kept fair, as a sentence or two.
    pub(crate) how: String,
    pub(crate) sides: Vec<Side>,
    pub(crate) ratios: Vec<Ratio>,
}

impl CaseResult {
    pub(crate) fn side(&self, name: &str) -> Option<&Side> {
        self.sides.iter().find(|side| side.name == name)
    }

    /// Of the sides whose name begins so, the one with the greatest median of `of`.
    pub(crate) fn best(&self, begins: &str, of: impl Fn(&Sample) -> f64) -> Option<&Side> {
        self.sides
            .iter()
            .filter(|side| side.name.starts_with(begins) && !side.samples.is_empty())
            .max_by(|a, b| a.median(&of).total_cmp(&b.median(&of)))
    }

    /// A figure of the fastest side whose name begins like the one, and of the fastest whose name begins like the other.
    pub(crate) fn of_best(
        &self,
        above: &str,
        below: &str,
        of: impl Fn(&Sample) -> f64,
    ) -> (Option<Figures>, Option<Figures>) {
        let best = |begins| self.best(begins, Sample::gib_per_second).map(|side| side.figures(&of));
        (best(above), best(below))
    }

    /// Notes the ratio of a figure of one side to that of another. Sides that were not measured give none.
    pub(crate) fn ratio(
        &mut self,
        what: &str,
        (above, below): (Option<Figures>, Option<Figures>),
        goal: Option<Goal>,
    ) {
        if let (Some(above), Some(below)) = (above, below) {
            self.ratios.push(Ratio::of(what, &above, &below, goal));
        }
    }
}

/// A way to move memory, to be measured in turns with others.
pub(crate) struct Way<'a> {
    pub(crate) name: String,
    /// Bytes of memory that it takes from the machine.
    pub(crate) takes: u64,
    pub(crate) run: Box<dyn Fn() -> anyhow::Result<Sample> + 'a>,
}

impl<'a> Way<'a> {
    pub(crate) fn new(
        name: impl Into<String>,
        takes: u64,
        run: impl Fn() -> anyhow::Result<Sample> + 'a,
    ) -> Self {
        Self { name: name.into(), takes, run: Box::new(run) }
    }
}

/// Those that are compared with each other, so many times each, in an order that has the first of them last every second time:
/// a b b a.
pub(crate) fn alternating<T: Copy, const N: usize>(all: [T; N], times: usize) -> impl Iterator<Item = T> {
    (0..times)
        .flat_map(move |time| (0..N).map(move |at| all[if time.is_multiple_of(2) { at } else { N - 1 - at }]))
}

/// Measures every way `runs` times, in turns, after `before`, which is told what it takes, each time. The first turn's order is the list's, and every second one
/// goes backwards: what a way leaves behind, in memory and in the host, meets another one then. A way that is in the list several
/// times is measured as often in each turn.
pub(crate) fn in_turns(
    ways: &[Way<'_>],
    runs: usize,
    before: impl Fn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Side>> {
    use anyhow::Context as _;
    let mut sides: Vec<Side> = Vec::new();
    for run in 0..runs {
        for index in 0..ways.len() {
            let way = &ways[if run % 2 == 0 { index } else { ways.len() - 1 - index }];
            before(way.takes)?;
            let sample = (way.run)().with_context(|| format!("measuring {}", way.name))?;
            eprintln!(
                "  {}: {:.3} s, {:.2} GiB/s, CPU s/GiB {:.3} + {:.3}",
                way.name,
                sample.seconds,
                sample.gib_per_second(),
                sample.source_cpu_per_gib(),
                sample.destination_cpu_per_gib()
            );
            match sides.iter_mut().find(|side| side.name == way.name) {
                Some(side) => side.samples.push(sample),
                None => sides.push(Side { name: way.name.clone(), samples: vec![sample] }),
            }
        }
    }
    Ok(sides)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(name: &str, seconds: &[f64]) -> Side {
        let sample = |&seconds| Sample { bytes: 1 << 30, seconds, ..Sample::default() };
        Side { name: name.into(), samples: seconds.iter().map(sample).collect() }
    }

    #[test]
    fn the_best_of_a_kind_is_found_and_compared() {
        let sides = vec![
            side("qemu 1", &[4.0, 1.0, 4.0]),
            side("qemu 2", &[2.0, 2.0, 9.0]),
            side("ours", &[0.5]),
            side("qemu 4", &[]),
        ];
        let mut result = CaseResult { case: "t".into(), how: String::new(), sides, ratios: Vec::new() };
        let best = result.best("qemu", Sample::gib_per_second).unwrap();
        assert_eq!(best.name, "qemu 2");
        let ours =
            result.best("ours", Sample::gib_per_second).map(|side| side.figures(Sample::gib_per_second));
        let theirs = Some(best.figures(Sample::gib_per_second));
        result.ratio("rate", (ours, theirs.clone()), Some(Goal::AtLeast(3.0)));
        result.ratio("nothing", (None, theirs), None);
        assert_eq!(result.ratios.len(), 1);
        assert_eq!(result.ratios[0].value, 4.0);
    }

    #[test]
    fn ways_take_turns_and_each_goes_first() {
        let order = std::cell::RefCell::new(Vec::new());
        let way = |name: &'static str| {
            let order = &order;
            Way::new(name, 7, move || {
                order.borrow_mut().push(name);
                Ok(Sample { bytes: 1, seconds: 1.0, ..Sample::default() })
            })
        };
        let taken = std::cell::Cell::new(0);
        let before = |bytes| {
            taken.set(taken.get() + bytes);
            Ok(())
        };
        let sides = in_turns(&[way("a"), way("b")], 3, before).unwrap();
        assert_eq!(taken.get(), 6 * 7);
        assert_eq!(*order.borrow(), ["a", "b", "b", "a", "a", "b"]);
        assert!(sides.iter().all(|side| side.samples.len() == 3));
        assert_eq!(alternating(["a", "b"], 3).collect::<String>(), "abbaab");
        assert_eq!(alternating(["a", "b", "c"], 2).collect::<String>(), "abccba");
    }
}
