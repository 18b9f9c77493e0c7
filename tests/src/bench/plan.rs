//! What is measured: candidates, numbers of flows, rounds; and what the figures are called.

use std::time::Duration;

use anyhow::bail;

use super::layout::SOCKETS;

/// A number of live flows; a power of two, at least one for each socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u32);

impl Size {
    /// The three sizes of the design.
    pub const ALL: [Size; 3] = [Size(SOCKETS), Size(SOCKETS * 64), Size(SOCKETS * 1024)];

    /// Number of flows.
    pub const fn flows(self) -> u32 {
        self.0
    }

    /// `1k`, `64k`, `1m`.
    pub fn label(self) -> String {
        if self.0 >= 1 << 20 { format!("{}m", self.0 >> 20) } else { format!("{}k", self.0 >> 10) }
    }
}

/// What can forward the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Bare,
    Nftables,
    Xdp,
    Tc,
    /// A minimal NAT over a kernel hash.
    TableHash,
    /// The same over buckets of records.
    TableRecords,
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::Bare, Kind::Nftables, Kind::Xdp, Kind::Tc, Kind::TableHash, Kind::TableRecords];

    pub const fn title(self) -> &'static str {
        match self {
            Kind::Bare => "bare XDP redirect",
            Kind::Nftables => "nftables masquerade",
            Kind::Xdp => "Portcullis, XDP",
            Kind::Tc => "Portcullis, TC",
            Kind::TableHash => "minimal NAT, kernel hash",
            Kind::TableRecords => "minimal NAT, records",
        }
    }

    /// Name of its packet rate.
    pub fn figure(self, size: Size) -> String {
        let stem = match self {
            Kind::Bare => "bare_redirect",
            Kind::Nftables => "nft",
            Kind::Xdp => "established",
            Kind::Tc => "tc_established",
            Kind::TableHash => "table_hash",
            Kind::TableRecords => "table_records",
        };
        format!("{stem}_{}", size.label())
    }

    /// Share of the bare redirect that the C prototypes of design §5 had (64-byte records), which the figure is
    /// meant to reach.
    pub fn goal(self, size: Size) -> Option<f64> {
        match (self, size.label().as_str()) {
            (Kind::Xdp, "1k") => Some(0.79),
            (Kind::Xdp, "64k") => Some(0.49),
            (Kind::Xdp, "1m") => Some(0.45),
            _ => None,
        }
    }
}

/// How the bench is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Ascending.
    pub sizes: Vec<Size>,
    /// Rounds in which every candidate is measured once.
    pub rounds: usize,
    /// Turns in a round: the candidates alternate this often, and a round's value is the mean of its turns. What the
    /// machine's neighbours do changes within seconds; what is compared should be measured side by side.
    pub turns: usize,
    /// How long a candidate is measured in a round, all turns together.
    pub window: Duration,
    /// Before that: the generator is on, nobody counts.
    pub ramp: Duration,
    /// Names of figures; empty is all of them.
    pub only: Vec<String>,
    /// Measure the two flow tables too.
    pub tables: bool,
    /// Measure time inside the programs too.
    pub program_time: bool,
    /// Tell on standard error what is being done.
    pub progress: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sizes: Size::ALL.to_vec(),
            rounds: 5,
            turns: 5,
            window: Duration::from_secs(1),
            ramp: Duration::from_millis(50),
            only: Vec::new(),
            tables: false,
            program_time: true,
            progress: true,
        }
    }
}

impl Options {
    /// One short round.
    pub fn quick() -> Self {
        Self { rounds: 1, turns: 2, window: Duration::from_millis(300), ..Self::default() }
    }

    /// The smallest that still sends packets through every candidate: a test of the bench, not a measurement.
    pub fn smoke() -> Self {
        Self {
            sizes: vec![Size::ALL[0]],
            turns: 1,
            window: Duration::from_millis(50),
            ramp: Duration::from_millis(10),
            progress: false,
            ..Self::quick()
        }
    }

    /// Drops the sizes of which no figure is wanted.
    pub(super) fn narrow(&mut self) -> anyhow::Result<()> {
        let mut known = Vec::new();
        for size in Size::ALL {
            known.extend(Kind::ALL.map(|kind| kind.figure(size)));
            known.extend([Kind::Bare, Kind::Xdp].map(|kind| program_time_figure(kind, size)));
        }
        if let Some(unknown) = self.only.iter().find(|name| !known.contains(name)) {
            bail!("there is no figure {unknown}; there are {}", known.join(", "));
        }
        let only = std::mem::take(&mut self.only);
        self.sizes.retain(|&size| {
            let of_size = format!("_{}", size.label());
            only.is_empty() || only.iter().any(|name| name.ends_with(&of_size))
        });
        self.only = only;
        Ok(())
    }

    /// How long one turn counts.
    pub(super) fn turn(&self) -> Duration {
        self.window / self.turns.max(1) as u32
    }

    /// Is this one to be measured? The bare redirect and nftables always are: the others are given as shares of them.
    pub(super) fn wants(&self, kind: Kind, size: Size) -> bool {
        match kind {
            Kind::Bare | Kind::Nftables => true,
            // They answer another question, so they are not part of "all".
            Kind::TableHash | Kind::TableRecords if self.only.is_empty() => self.tables,
            _ => self.reports(&kind.figure(size)),
        }
    }

    /// Is this figure asked for?
    pub(super) fn reports(&self, figure: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == figure)
    }
}

/// Name of the time in a candidate's program.
pub(super) fn program_time_figure(kind: Kind, size: Size) -> String {
    let stem = if kind == Kind::Bare { "bare_ns_per_packet" } else { "ns_per_packet" };
    format!("{stem}_{}", size.label())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_called_as_the_design_calls_them() {
        assert_eq!(Size::ALL.map(Size::label), ["1k", "64k", "1m"]);
        assert_eq!(Kind::Tc.figure(Size::ALL[1]), "tc_established_64k");
    }

    #[test]
    fn asking_for_one_figure_leaves_only_its_size_and_what_it_is_compared_with() {
        let mut options = Options { only: vec!["established_64k".into()], ..Options::default() };
        options.narrow().expect("it is known");
        assert_eq!(options.sizes, [Size::ALL[1]]);
        let wanted: Vec<Kind> = Kind::ALL.into_iter().filter(|&k| options.wants(k, Size::ALL[1])).collect();
        assert_eq!(wanted, [Kind::Bare, Kind::Nftables, Kind::Xdp]);
        let tables = [Kind::TableHash, Kind::TableRecords];
        assert!(tables.iter().all(|&k| !Options::default().wants(k, Size::ALL[0])));
        let options = Options { tables: true, ..Options::default() };
        assert!(tables.iter().all(|&k| options.wants(k, Size::ALL[0])));
        let options = Options { only: vec!["table_hash_1k".into()], ..Options::default() };
        assert_eq!(tables.map(|k| options.wants(k, Size::ALL[0])), [true, false]);
        assert!(Options { only: vec!["nat".into()], ..Options::default() }.narrow().is_err());
    }
}
