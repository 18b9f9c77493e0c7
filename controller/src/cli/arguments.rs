//! What may stand on the command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use super::answers::{DiagnoseArguments, EffectiveArguments, LintArguments, TagsArguments, VerifyArguments};
use crate::api::{DEFAULT_SOCKET, Protocol};
use crate::datapath::DEFAULT_PINS;
use crate::observe::scrape::Place;

/// Where the daemon keeps what must survive a reboot, unless told otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/portcullis";

/// NAT gateway and firewall with Azure's rule model, on XDP and TC.
#[derive(Debug, Parser)]
#[command(name = "portcullis", version, max_term_width = 100)]
pub struct Arguments {
    /// The daemon's control socket.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// How to print answers: a table for people, JSON for programs.
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
    #[command(subcommand)]
    pub command: Command,
}

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Table,
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Put a policy in force and keep it so: the daemon.
    Run(RunArguments),
    /// Stop the daemon, detach the datapath and undo every change made on this host.
    Down {
        /// Directory with the daemon's state.
        #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
        state_dir: PathBuf,
        /// Directory with its pins, in a bpf filesystem.
        #[arg(long, value_name = "DIR", default_value = DEFAULT_PINS)]
        pin_dir: PathBuf,
        /// Also forget who owns which ports; the next start hands them out anew.
        #[arg(long)]
        forget: bool,
    },
    /// Check policy files. Needs neither root nor a kernel with BPF.
    Check {
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Make a policy of Azure's JSON: answers of its REST interface, output of `az`, ARM templates.
    Import(ImportArguments),
    /// Make the daemon load this policy now.
    Apply {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// What is in force, where it is attached, and how it is doing.
    Status,
    /// Live flows: list them, or end them.
    #[command(args_conflicts_with_subcommands = true)]
    Flows {
        /// Only this guest's (`vm1` or `vm1/ipconfig1`).
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,
        /// At most this many.
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        #[command(subcommand)]
        end: Option<FlowsCommand>,
    },
    /// What became of packets, by reason, and the latest drops.
    Drops {
        /// Reasons that never occurred too.
        #[arg(long)]
        all: bool,
    },
    /// Each guest's SNAT ports: allocated, used, held back, free, draining; or where they go; or who holds one.
    Snat(SnatArguments),
    /// Who has, or had, a public port: guest or rule.
    Whois {
        /// ADDR:PORT, perhaps with /tcp or /udp behind it.
        #[arg(value_name = "ADDR:PORT[/PROTOCOL]")]
        port: String,
        /// 2026-11-22T05:33:50Z, `2h ago` or -2h; now, if it is left out.
        #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
        at: Option<String>,
        /// Where the history is, if no daemon answers.
        #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
        state_dir: PathBuf,
    },
    /// What `apply` of this file would change. Code 3 if it would change anything.
    Plan {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Security rules with their hits.
    Rules {
        /// Only this network security group's.
        #[arg(long, value_name = "NAME")]
        group: Option<String>,
        /// Also show by which rules a rule that can never match is shadowed.
        #[arg(long)]
        shadowed: bool,
    },
    /// What would happen to a packet, and why.
    Explain(ExplainArguments),
    /// The rules in force on a network interface, tags and application groups expanded.
    Effective(EffectiveArguments),
    /// IP flow verify: do an interface's groups allow this flow, and which rule says so?
    Verify(VerifyArguments),
    /// NSG diagnostics: every rule that was tried, with the fields that matched.
    Diagnose(DiagnoseArguments),
    /// What a policy says and hardly means: rules that can never match, openings, unused groups.
    Lint(LintArguments),
    /// Service tags: what they stand for, and which of them an address is in.
    Tags(TagsArguments),
    /// Print the JSON Schema of policy files, for editors.
    Schema,
}

/// Ending flows.
#[derive(Debug, Subcommand)]
pub enum FlowsCommand {
    /// End the flows that every selector given matches; at least one is needed.
    Kill {
        /// This guest's (`vm1` or `vm1/ipconfig1`), whichever side opened them.
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,
        /// Opened by this address, before or after translation.
        #[arg(long, value_name = "ADDR[:PORT]")]
        from: Option<String>,
        /// Opened towards this address, before or after translation.
        #[arg(long, value_name = "ADDR[:PORT]")]
        to: Option<String>,
        /// tcp, udp, icmp, icmp6, esp, ah, or a number.
        #[arg(long, value_name = "NAME")]
        protocol: Option<String>,
        /// Only show what would be ended.
        #[arg(long)]
        dry_run: bool,
    },
    /// End all flows, and give the ports of UDP sockets and pings back.
    Flush {
        /// Only this guest's.
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,
    },
}

/// Arguments of `snat`.
#[derive(Debug, clap::Args)]
pub struct SnatArguments {
    /// Only this guest's (`vm1` or `vm1/ipconfig1`).
    #[arg(long, value_name = "NAME")]
    pub guest: Option<String>,
    /// Only of this frontend (its name, lb/name) or public address.
    #[arg(long, value_name = "NAME|ADDR")]
    pub frontend: Option<String>,
    /// `destination`: where the ports go, the largest share first.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub by: Option<SnatBy>,
    /// At most this many destinations.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub limit: usize,
    /// Who holds this public port, and the live flows on it.
    #[arg(long, value_name = "ADDR:PORT[/PROTOCOL]", conflicts_with_all = ["guest", "frontend", "by"])]
    pub port: Option<String>,
}

/// What `snat` counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SnatBy {
    Destination,
}

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArguments {
    /// The policy, YAML. It is watched: a change is applied, unless it has errors.
    #[arg(long, value_name = "FILE")]
    pub policy: PathBuf,
    /// Directory for what must survive a reboot.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
    /// Directory for pinned programs and tables, in a bpf filesystem.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PINS)]
    pub pin_dir: PathBuf,
    /// Let Prometheus ask for metrics here: an address with a port, such as 127.0.0.1:9464, or the path of a socket.
    #[arg(long, value_name = "ADDR:PORT|PATH")]
    pub metrics: Option<Place>,
    /// Start anew where an upgrade finds tables of another layout: their flows are lost, instead of being copied or the start
    /// refused.
    #[arg(long)]
    pub reset: bool,
    /// off, error, warn, info, debug or trace. From debug on the kernel programs log every new flow, which costs.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,
}

/// Arguments of `import`.
#[derive(Debug, clap::Args)]
pub struct ImportArguments {
    /// What Azure's tools wrote; `-` is standard input. Several files become one policy.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Where the policy goes; `-` is standard output. A file that exists is not replaced.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub to: PathBuf,
    /// Also write the report, which goes to standard error, to this file.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Azure's published service tag file; the policy will name it.
    #[arg(long, value_name = "FILE")]
    pub service_tags: Option<PathBuf>,
    /// What the names of the guests' devices begin with.
    #[arg(long, value_name = "TEXT", default_value = "tap-")]
    pub device_prefix: String,
    /// The device towards the world.
    #[arg(long, value_name = "DEVICE", default_value = "uplink-REPLACE")]
    pub uplink: String,
}

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
pub struct ExplainArguments {
    /// Who sends: a guest's name, `host`, or an address ([fd00::4] or fd00::4 of IPv6); perhaps with a port.
    #[arg(long, value_name = "NAME|IP[:PORT]")]
    pub from: String,
    /// Who is to receive: a guest's name, `host`, or an address; with a port ([fd00::4]:443) for TCP and UDP.
    #[arg(long, value_name = "NAME|IP[:PORT]")]
    pub to: String,
    /// tcp, udp, icmp, icmp6, esp, ah, or a number.
    #[arg(long, value_name = "NAME", default_value_t = Protocol::Tcp)]
    pub protocol: Protocol,
    /// The sender's port, or the identifier of an echo request.
    #[arg(long, value_name = "PORT")]
    pub from_port: Option<u16>,
    /// Of guests with both families take the IPv6 address.
    #[arg(long)]
    pub ipv6: bool,
    /// Ask the kernel's programs as well, without a trace; code 1 if they would do something else.
    #[arg(long)]
    pub live: bool,
    /// Show every rule that was tried, with the fields that did not match.
    #[arg(long, visible_alias = "verbose")]
    pub all_rules: bool,
}
