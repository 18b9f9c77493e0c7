//! A whole gateway of the lab: a topology, a policy for it and the controller running in its middle.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use crate::lab::{BpfFs, Daemon, DaemonSpec, Topology, TopologySpec, eventually_some};

/// Hook asked for in the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WithHook {
    Xdp,
    Tc,
    Auto,
}

impl WithHook {
    pub fn word(self) -> &'static str {
        match self {
            WithHook::Xdp => "xdp",
            WithHook::Tc => "tc",
            WithHook::Auto => "auto",
        }
    }
}

/// Runs a test under either hook, both at once, each in a lab of its own: for tests that mostly wait.
///
/// # Panics
/// If one of them does; its message is above.
pub fn under_both(work: impl Fn(WithHook) + Sync) {
    std::thread::scope(|scope| {
        for hook in [WithHook::Xdp, WithHook::Tc] {
            let work = &work;
            scope.spawn(move || work(hook));
        }
    });
}

/// Ready within this, or the test fails with the daemon's log.
const READY: Duration = Duration::from_secs(180);

/// The topology with the controller running. Dropped, everything is gone.
pub struct Edge {
    /// The kernel counts runs of programs as long as this is open.
    _statistics: std::os::fd::OwnedFd,
    // Dropped in this order: the daemon before the namespaces it is in.
    pub daemon: Daemon,
    pub topology: Topology,
    pub bpffs: BpfFs,
}

impl Edge {
    /// Builds the topology, writes the policy and starts the controller on it.
    pub fn start(spec: &TopologySpec, policy: &str) -> anyhow::Result<Self> {
        Self::start_in(Topology::build(spec)?, policy)
    }

    /// The same in a topology that is there already.
    pub fn start_in(topology: Topology, policy: &str) -> anyhow::Result<Self> {
        Self::start_build(topology, policy, &binary()?)
    }

    /// The same with another build of the controller.
    pub fn start_build(topology: Topology, policy: &str, build: &Path) -> anyhow::Result<Self> {
        let statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime)?;
        let bpffs = BpfFs::mount()?;
        let file = bpffs.scratch().write("policy.yaml", policy)?;
        let mut daemon = Daemon::spawn(topology.gateway(), &DaemonSpec::beside(&bpffs, build, &file))?;
        daemon.wait_ready(READY)?;
        Ok(Self { _statistics: statistics, daemon, topology, bpffs })
    }

    /// Overwrites the policy file and applies it.
    pub fn apply(&self, policy: &str) -> anyhow::Result<(bool, String)> {
        let file = self.bpffs.scratch().write("policy.yaml", policy)?;
        let (status, out, err) =
            self.daemon.client(&["apply", file.to_str().context("the path is text")?])?;
        Ok((status.success(), out + &err))
    }

    /// Packets by reason, from `drops --all`.
    pub fn reasons(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let answer = self.ask(&["drops", "--all"])?;
        let rows = answer["reasons"].as_array().context("drops has reasons")?;
        Ok(rows
            .iter()
            .filter_map(|row| Some((row["reason"].as_str()?.to_owned(), row["packets"].as_u64()?)))
            .filter(|(_, packets)| *packets != 0)
            .collect())
    }

    /// Hits of a rule, named `group/Direction/name`.
    pub fn rule_hits(&self, group: &str, direction: &str, name: &str) -> anyhow::Result<u64> {
        let answer = self.ask(&["rules"])?;
        let rows = answer["rules"].as_array().context("rules has rules")?;
        let row = rows
            .iter()
            .find(|r| {
                r["group"] == group
                    && r["direction"] == direction
                    && r["name"].as_str().is_some_and(|n| n.ends_with(name))
            })
            .with_context(|| format!("no rule {group}/{direction}/{name} in {answer}"))?;
        row["hits"].as_u64().context("a rule has hits")
    }

    /// The member's ports: (frontend address, first, last) ranges, from `snat`.
    pub fn owns(&self, guest: &str, port: u16) -> anyhow::Result<bool> {
        let answer = self.ask(&["snat"])?;
        let rows = answer["guests"].as_array().context("snat has guests")?;
        let row = rows
            .iter()
            .find(|r| r["guest"].as_str().is_some_and(|g| g.starts_with(guest)))
            .with_context(|| format!("no guest {guest} in {answer}"))?;
        let ranges = row["ranges"].as_array().with_context(|| format!("no ranges in {row}"))?;
        Ok(ranges.iter().any(|r| {
            let bound = |key: &str| r[key].as_u64().unwrap_or(u64::MAX);
            bound("first") <= u64::from(port) && u64::from(port) <= bound("last")
        }))
    }

    /// How often each program ran, by (device, program), as the kernel says.
    pub fn run_counts(&self) -> anyhow::Result<BTreeMap<(String, String), u64>> {
        let status = self.ask(&["status"])?;
        let mut counts = BTreeMap::new();
        for device in status["devices"].as_array().context("status has devices")? {
            let name = device["name"].as_str().unwrap_or_default();
            for program in device["programs"].as_array().into_iter().flatten() {
                let what = program["program"].as_str().unwrap_or_default();
                counts.insert((name.to_owned(), what.to_owned()), program["runCount"].as_u64().unwrap_or(0));
            }
        }
        Ok(counts)
    }

    /// How often each program ran during `work`, by (device, program). Needs run statistics, see [`Edge::run_counts`].
    pub fn runs_during(&self, work: impl FnOnce()) -> anyhow::Result<BTreeMap<(String, String), u64>> {
        let before = self.run_counts()?;
        work();
        let mut runs = self.run_counts()?;
        for (program, count) in &mut runs {
            *count = count.saturating_sub(before.get(program).copied().unwrap_or(0));
        }
        Ok(runs)
    }

    /// Starts the controller again after its end.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.daemon.start()?;
        self.daemon.wait_ready(READY)
    }

    /// The policy generation in force.
    pub fn generation(&self) -> anyhow::Result<u64> {
        self.ask(&["status"])?["generation"].as_u64().context("status has a generation")
    }

    /// How many flows this guest holds, as the datapath counts them for its quota.
    pub fn held(&self, guest: &str) -> anyhow::Result<u64> {
        let status = self.ask(&["status"])?;
        let hops = status["nextHops"].as_array().context("status has next hops")?;
        let name = format!("guest:{guest}/");
        let hop = hops.iter().find(|hop| hop["name"].as_str().is_some_and(|hop| hop.starts_with(&name)));
        hop.and_then(|hop| hop["flows"]["held"].as_u64())
            .with_context(|| format!("what {guest} holds is not in {status}"))
    }

    /// Packets of one reason so far.
    pub fn reason(&self, reason: &str) -> anyhow::Result<u64> {
        Ok(self.reasons()?.get(reason).copied().unwrap_or(0))
    }

    /// The guest's port ranges, first and last.
    pub fn port_ranges(&self, guest: &str) -> anyhow::Result<Vec<(u16, u16)>> {
        let answer = self.ask(&["snat"])?;
        let rows = answer["guests"].as_array().context("snat has guests")?;
        let row = rows.iter().find(|r| r["guest"].as_str().is_some_and(|g| g.starts_with(guest)));
        let ranges = row
            .and_then(|row| row["ranges"].as_array())
            .with_context(|| format!("no ranges of {guest} in {answer}"))?;
        let bound = |range: &Value, key: &str| range[key].as_u64().and_then(|port| u16::try_from(port).ok());
        let pairs = ranges.iter().map(|range| Some((bound(range, "first")?, bound(range, "last")?)));
        pairs.collect::<Option<_>>().with_context(|| format!("ranges in {answer}"))
    }

    /// What `status` says about a device.
    pub fn device(&self, name: &str) -> anyhow::Result<Value> {
        let status = self.ask(&["status"])?;
        let devices = status["devices"].as_array().context("status has devices")?;
        devices
            .iter()
            .find(|device| device["name"] == name)
            .cloned()
            .with_context(|| format!("no device {name} in {status}"))
    }

    /// Waits until `read` gives what the caller waits for.
    pub fn wait<T>(&self, mut read: impl FnMut(&Edge) -> Option<T>) -> Option<T> {
        eventually_some(Duration::from_secs(10), || read(self))
    }

    /// Answer of a client command.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let json = [&["--output", "json"], arguments].concat();
        self.daemon.ask(&json)
    }
}

/// The controller built with this test.
pub fn binary() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe()?;
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join("portcullis")).find(|path| path.is_file());
    found.with_context(|| format!("no portcullis binary beside {}; build the workspace", me.display()))
}

/// A policy for a topology: all guests in one subnet of `lab` (10.0.0.0/16) and one pool behind the frontend 203.0.113.10.
///
/// `hooks` is asked of every device; `extra` is appended to the document (groups, timers, ...). A guest in `groups` has that group
/// on its NIC; `subnet_group` is the subnet's.
#[derive(Debug, Clone)]
pub struct LabPolicy {
    pub hook: WithHook,
    pub announce: &'static str,
    pub subnet_group: Option<&'static str>,
    pub nic_groups: BTreeMap<&'static str, &'static str>,
    /// Guest -> instance-level public IP.
    pub instances: BTreeMap<&'static str, &'static str>,
    pub ports: u32,
    pub extra: String,
}

impl LabPolicy {
    pub fn new(hook: WithHook) -> Self {
        Self {
            hook,
            announce: "proxy",
            subnet_group: None,
            nic_groups: BTreeMap::new(),
            instances: BTreeMap::new(),
            ports: 0,
            extra: String::new(),
        }
    }

    /// The YAML document.
    pub fn yaml(&self, spec: &TopologySpec) -> String {
        let hook = self.hook.word();
        let mut y = String::from(
            "virtualNetworks:\n  - name: lab\n    addressSpace: { addressPrefixes: [10.0.0.0/16] }\n",
        );
        let group = self.subnet_group.map(|g| format!(", networkSecurityGroup: {g}")).unwrap_or_default();
        let _ = writeln!(
            y,
            "    subnets: [{{ name: guests, addressPrefix: 10.0.0.0/24{group} }}]\nnetworkInterfaces:"
        );
        for guest in &spec.guests {
            let nic = self
                .nic_groups
                .get(guest.name.as_str())
                .map(|g| format!(", networkSecurityGroup: {g}"))
                .unwrap_or_default();
            let public = if self.instances.contains_key(guest.name.as_str()) {
                format!(", publicIPAddress: pip-{}", guest.name)
            } else {
                String::new()
            };
            let _ = writeln!(
                y,
                "  - {{ name: {}, device: {}, hook: {hook}{nic}, ipConfigurations: [{{ subnet: guests, privateIPAddress: {}{public} }}] }}",
                guest.name, guest.device, guest.address
            );
        }
        let _ = writeln!(
            y,
            "publicIPAddresses:\n  - {{ name: pip-lb, ipAddress: 203.0.113.10, announce: {} }}",
            self.announce
        );
        for (guest, address) in &self.instances {
            let _ = writeln!(y, "  - {{ name: pip-{guest}, ipAddress: {address}, announce: proxy }}");
        }
        let members: Vec<&str> =
            spec.guests.iter().map(|g| g.name.as_str()).filter(|g| !self.instances.contains_key(g)).collect();
        let _ = write!(
            y,
            "loadBalancers:\n  - name: lb\n    frontendIPConfigurations: [{{ name: fe, publicIPAddress: pip-lb }}]\n    \
             backendAddressPools: [{{ name: pool, backendIPConfigurations: [{}] }}]\n    \
             outboundRules: [{{ name: out, frontendIPConfigurations: [fe], backendAddressPool: pool, protocol: All, allocatedOutboundPorts: {} }}]\n\
             uplinks: [{{ device: {}, hook: {hook} }}]\n",
            members.join(", "),
            self.ports,
            spec.uplink_device
        );
        y.push_str(&self.extra);
        y
    }
}

/// What the kernel and the counters said at one moment; see [`HookCheck::end`].
pub struct HookCheck {
    hook: WithHook,
    runs: [u64; 2],
    passed: u64,
}

/// Reasons under which a packet is handed to the kernel; XDP leaves those to TC (ADR 0002).
const PASSED: [&str; 5] = ["not_ours", "to_host", "arp_learned", "nd_learned", "from_host"];

impl HookCheck {
    /// Begins to watch which entry runs.
    pub fn begin(edge: &Edge, hook: WithHook) -> anyhow::Result<Self> {
        let (runs, passed) = Self::read(edge)?;
        Ok(Self { hook, runs, passed })
    }

    fn read(edge: &Edge) -> anyhow::Result<([u64; 2], u64)> {
        // Runs are counted for a program, not for a device: every device of this load shows the same number.
        let counts = edge.run_counts()?;
        let of = |program: &str| {
            counts.iter().filter(|((_, p), _)| p == program).map(|(_, n)| *n).max().unwrap_or(0)
        };
        let reasons = edge.reasons()?;
        let passed = PASSED.iter().filter_map(|reason| reasons.get(*reason)).sum();
        Ok(([of("pc_xdp"), of("pc_tc")], passed))
    }

    /// Asserts that the entry of the hook asked for ran, and that of the other did not: TC not at all but for packets
    /// that XDP hands to the kernel (the router's ARP), each of which TC counted.
    pub fn end(self, edge: &Edge) -> anyhow::Result<()> {
        let (runs, passed) = Self::read(edge)?;
        let [xdp, tc] = [runs[0] - self.runs[0], runs[1] - self.runs[1]];
        match self.hook {
            WithHook::Xdp => {
                anyhow::ensure!(xdp > 0, "pc_xdp did not run");
                // And what goes to a router whose address is being asked for anew: on a busy machine that takes a moment.
                let most = passed - self.passed + xdp / 10;
                anyhow::ensure!(
                    tc <= most,
                    "pc_tc ran {tc} times under XDP, which ran {xdp} times, for {} packets of the kernel's",
                    passed - self.passed
                );
            }
            WithHook::Tc | WithHook::Auto => {
                anyhow::ensure!(tc > 0, "pc_tc did not run");
                anyhow::ensure!(xdp == 0, "pc_xdp ran {xdp} times under TC");
            }
        }
        Ok(())
    }
}
