//! Ratios of medians, what chance alone does to them, and what they are to be.

use serde::{Deserialize, Serialize};

/// What a ratio is of: a figure of every sample of one side.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Figures(pub(crate) Vec<f64>);

impl Figures {
    /// One that is no measurement, such as what is allowed.
    pub(crate) fn exact(value: f64) -> Self {
        Self(vec![value])
    }
}

/// How one figure relates to another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) what: String,
    pub(crate) value: f64,
    /// Where nine in ten ratios lie when the samples are drawn again; `None` of too few.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) nine_in_ten: Option<[f64; 2]>,
    /// What it is to be; `None` for what is told for context.
    pub(crate) goal: Option<Goal>,
}

/// What a ratio is to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }
}

impl Ratio {
    /// Of medians.
    pub(crate) fn of(what: impl Into<String>, above: &Figures, below: &Figures, goal: Option<Goal>) -> Self {
        let value = median(above.0.iter().copied()) / median(below.0.iter().copied());
        Self { what: what.into(), value, nine_in_ten: nine_in_ten(&above.0, &below.0), goal }
    }

    /// What the goal comes to, in words; nothing without one.
    pub(crate) fn verdict(&self) -> &'static str {
        let Some(goal) = self.goal else { return "" };
        let is_met = goal.is_met(self.value);
        let other_way = |value: &f64| goal.is_met(*value) != is_met;
        match (is_met, self.nine_in_ten.is_some_and(|between| between.iter().any(other_way))) {
            (true, false) => "met",
            (true, true) => "met, and chance could say otherwise",
            (false, true) => "not met, and chance could say otherwise",
            (false, false) => "not met",
        }
    }
}

/// The bootstrap (Efron 1979): draws from each side as many samples as it has, with replacement, many times, and answers between
/// which ratios of medians nine in ten lie.
fn nine_in_ten(above: &[f64], below: &[f64]) -> Option<[f64; 2]> {
    const DRAWS: usize = 2000;
    if above.len().max(below.len()) < 3 {
        return None;
    }
    // xorshift64 (Marsaglia 2003): the same samples give the same answer.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = |from: &[f64]| {
        let drawn = (0..from.len()).map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            from[(state >> 33) as usize % from.len()]
        });
        median(drawn)
    };
    let mut ratios: Vec<f64> = (0..DRAWS).map(|_| draw(above) / draw(below)).collect();
    ratios.sort_by(f64::total_cmp);
    Some([ratios[DRAWS / 20], ratios[DRAWS - 1 - DRAWS / 20]])
}

/// The middle one, or the mean of the two in the middle; NaN of none.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => f64::NAN,
        Some(upper) if sorted.len() % 2 == 1 => *upper,
        Some(upper) => (sorted[middle - 1] + upper) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn a_ratio_says_what_chance_does_to_it() {
        let scattered = Figures((0..20).map(|n| 0.8 + f64::from(n) / 50.0).collect());
        let ratio = Ratio::of("r", &scattered, &Figures::exact(1.0), Some(Goal::AtLeast(0.95)));
        let [low, high] = ratio.nine_in_ten.unwrap();
        assert!((ratio.value - 0.99).abs() < 1e-9);
        assert!((0.85..0.95).contains(&low) && (1.02..1.12).contains(&high), "{low} {high}");
        assert_eq!(ratio.verdict(), "met, and chance could say otherwise");
        let verdict = |goal| Ratio { goal: Some(goal), ..ratio.clone() }.verdict();
        assert_eq!(verdict(Goal::AtLeast(1.0)), "not met, and chance could say otherwise");
        assert_eq!((verdict(Goal::AtLeast(1.5)), verdict(Goal::AtMost(1.5))), ("not met", "met"));
        assert!(Goal::AtMost(4.0).is_met(4.0) && Goal::AtLeast(4.0).is_met(4.0));
        let single = Ratio::of("r", &Figures(vec![2.0, 4.0]), &Figures::exact(1.0), None);
        assert_eq!((single.value, single.nine_in_ten, single.verdict()), (3.0, None, ""));
    }
}
