//! How the bench is run: how long, how often, how much of it.

use std::time::{Duration, Instant};

use crate::stop;

/// How large everything is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scale {
    /// A test of the bench: the smallest that goes all the ways, with names that promise more.
    Smoke,
    /// One short round of everything in its full size.
    Quick,
    /// A measurement.
    Full,
}

impl Scale {
    /// As reports call it.
    pub fn name(self) -> &'static str {
        self.pick("smoke", "quick", "full")
    }

    /// The one of three that belongs to this scale.
    pub fn pick<T>(self, smoke: T, quick: T, full: T) -> T {
        match self {
            Scale::Smoke => smoke,
            Scale::Quick => quick,
            Scale::Full => full,
        }
    }
}

/// How the bench is run.
#[derive(Debug, Clone)]
pub struct Options {
    pub scale: Scale,
    /// Rounds in which every candidate is measured once.
    pub rounds: usize,
    /// Turns in a round: the candidates alternate this often, and a round's value is the mean of its turns. What the
    /// machine's neighbours do changes within seconds; what is compared should be measured side by side.
    pub turns: usize,
    /// How long a candidate is measured in a round, all turns together.
    pub window: Duration,
    /// Before that: the generator is on, nobody counts.
    pub ramp: Duration,
    /// Names of figures and sections; empty is all of them. A section that was named itself gets an empty list.
    pub only: Vec<String>,
    /// Tell on standard error what is being done.
    pub progress: bool,
    /// Which section of how many is being measured, for the progress.
    pub place: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: Scale::Full,
            rounds: 5,
            turns: 5,
            window: Duration::from_secs(1),
            ramp: Duration::from_millis(50),
            only: Vec::new(),
            progress: true,
            place: String::new(),
        }
    }
}

impl Options {
    /// One short round.
    pub fn quick() -> Self {
        let window = Duration::from_millis(300);
        Self { scale: Scale::Quick, rounds: 1, turns: 2, window, ..Self::default() }
    }

    /// The smallest that still sends packets through every candidate: a test of the bench, not a measurement.
    pub fn smoke() -> Self {
        Self {
            scale: Scale::Smoke,
            turns: 1,
            window: Duration::from_millis(50),
            ramp: Duration::from_millis(10),
            progress: false,
            ..Self::quick()
        }
    }

    /// How long one turn counts.
    pub fn turn(&self) -> Duration {
        self.window / self.turns.max(1) as u32
    }

    /// Is this figure asked for?
    pub fn wants(&self, figure: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == figure)
    }

    /// Says on standard error what is being done.
    pub fn tell(&self, line: &str) {
        // Not worth a word if somebody has asked to stop.
        if self.progress && !stop::asked() {
            eprintln!("bench: {}{line}", self.place);
        }
    }

    /// Runs `one` once for each round, with its number from 0. Each is told when it begins, with how long the rest takes
    /// at the pace of those before.
    ///
    /// # Errors
    ///
    /// Those of `one`, and one instead of the next round when somebody has asked to stop: what the caller has collected
    /// until then can still be reported.
    pub fn each_round(
        &self,
        what: &str,
        mut one: impl FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let since = Instant::now();
        for round in 0..self.rounds {
            stop::check()?;
            let left = match round {
                0 => String::new(),
                done => {
                    let left = since.elapsed().as_secs_f64() / done as f64 * (self.rounds - done) as f64;
                    format!(", {left:.0} s left")
                }
            };
            self.tell(&format!("{what}: round {} of {}{left}", round + 1, self.rounds));
            one(round)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_comes_once() {
        let options = Options { rounds: 3, progress: false, ..Options::default() };
        let mut rounds = Vec::new();
        let all = options.each_round("test", |round| {
            rounds.push(round);
            Ok(())
        });
        all.expect("nobody stops it");
        assert_eq!(rounds, [0, 1, 2]);
    }

    #[test]
    fn without_names_everything_is_wanted() {
        assert!(Options::default().wants("new_flow"));
        let options = Options { only: vec!["new_flow".to_owned()], ..Options::default() };
        assert_eq!(["new_flow", "tcp_crr"].map(|name| options.wants(name)), [true, false]);
    }
}
