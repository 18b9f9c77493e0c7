//! What to install, as a pure function of what a machine has.
//!
//! The plan is made one step at a time, because what a step brings (which LLVM a compiler carries) decides the next.
//! `--dry-run` walks the same steps on a machine that only pretends to have taken them.

use std::collections::BTreeSet;

/// The LLVM of both compilers this installs, and so the bpf-linker to build before one of them is there to be asked.
pub const LLVM: u32 = 22;

/// A nightly by date, not "nightly": the newest one's LLVM is regularly ahead of what a distribution packages, and
/// then no bpf-linker can be built for it. It is installed beside the toolchains that are there and none is changed.
const NIGHTLY: &str = "nightly-2026-05-20";

/// LLVM versions bpf-linker 0.13 has a feature for.
const LINKER_FEATURES: std::ops::RangeInclusive<u32> = 21..=23;

const BPF_LINKER: &str = "=0.13.0";

/// Debian's compiler for building web browsers: recent, and with a core library for BPF. (Debian's plain rustc is
/// too old.)
const DEBIAN_COMPILER: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// Programs the lab runs, and the Debian packages they come from.
pub const TOOLS: [(&str, &str); 17] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("bridge", "iproute2"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("iperf3", "iperf3"),
    ("ethtool", "ethtool"),
    ("ping", "iputils-ping"),
    ("curl", "curl"),
    ("ps", "procps"),
    ("sysctl", "procps"),
    ("tcpdump", "tcpdump"),
    ("bpftool", "bpftool"),
    // A DHCP server and a client of it, neither of them a service.
    ("dnsmasq", "dnsmasq-base"),
    ("udhcpc", "udhcpc"),
    // A STUN server and who asks it how a NAT behaves (RFC 5780).
    ("turnserver", "coturn"),
    ("turnutils_natdiscovery", "coturn"),
];

/// Debian starts a package's service as soon as it is installed, and at every boot. The lab starts its STUN servers itself, in
/// namespaces; whoever had coturn before is not asked to install it. apt runs this after dpkg, perhaps more than once.
const NO_STUN_SERVICE: &str = "DPkg::Post-Invoke::=test ! -d /run/systemd/system || \
     systemctl disable --quiet --now coturn.service || true";

/// How commands for the whole machine are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    Root,
    Sudo,
    None,
}

/// What apt offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Apt {
    /// Whether its lists were refreshed in this run.
    pub updated: bool,
    pub compiler: bool,
    /// Versions N of which it has llvm-N-dev.
    pub llvm: BTreeSet<u32>,
}

/// Everything about a machine that the plan depends on.
#[derive(Clone, Debug)]
pub struct Machine {
    pub privilege: Privilege,
    /// A compiler and a linker that fit each other are there, or prebuilt objects make them unnecessary.
    pub builds_ebpf: bool,
    /// LLVM versions of the compilers that qualify, in the finder's order.
    pub compilers: Vec<u32>,
    /// rustup is there and has a default toolchain. Without one, installing a toolchain would make it the default.
    pub rustup: bool,
    /// LLVM versions whose development files are installed.
    pub llvm: BTreeSet<u32>,
    /// `None` where there is no apt.
    pub apt: Option<Apt>,
    /// The members of [`TOOLS`] that are not installed.
    pub missing_tools: Vec<&'static str>,
    /// Steps that were tried and failed; they are not tried again.
    pub failed: BTreeSet<Step>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    RefreshApt,
    RustupNightly,
    DebianCompiler,
    LlvmDev(u32),
    BpfLinker(u32),
    Tools(Vec<&'static str>),
}

/// What the plan says next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Everything is there.
    Ready,
    Take(Step),
    /// Nothing can be done automatically (any more): what a person must install.
    ByHand(Vec<String>),
}

impl Machine {
    pub fn next(&self) -> Next {
        if self.builds_ebpf && self.missing_tools.is_empty() {
            return Next::Ready;
        }
        let candidates = [self.refresh(), self.toolchain(), self.tools()];
        match candidates.into_iter().flatten().find(|step| !self.failed.contains(step)) {
            Some(step) => Next::Take(step),
            None => Next::ByHand(self.by_hand()),
        }
    }

    /// Once, before anything is asked of apt: on a fresh container its lists are empty.
    fn refresh(&self) -> Option<Step> {
        let apt = self.usable_apt()?;
        (!apt.updated).then_some(Step::RefreshApt)
    }

    fn usable_apt(&self) -> Option<&Apt> {
        self.apt.as_ref().filter(|_| self.privilege != Privilege::None)
    }

    /// The next step towards a compiler and a linker that fit each other.
    fn toolchain(&self) -> Option<Step> {
        if self.builds_ebpf {
            return None;
        }
        // The first compiler that a linker can be built for.
        if let Some(llvm) = self.compilers.iter().find_map(|compiler| self.llvm_for(*compiler)) {
            let step = if self.llvm.contains(&llvm) { Step::BpfLinker(llvm) } else { Step::LlvmDev(llvm) };
            return (!self.failed.contains(&step)).then_some(step);
        }
        let rustup = self.rustup && self.llvm_for(LLVM).is_some();
        let debian = self.usable_apt().is_some_and(|apt| apt.compiler);
        [(rustup, Step::RustupNightly), (debian, Step::DebianCompiler)]
            .into_iter()
            .find(|(possible, step)| *possible && !self.failed.contains(step))
            .map(|(_, step)| step)
    }

    /// The LLVM to build bpf-linker with for a compiler with this one: as old as may be, installed before available.
    fn llvm_for(&self, compiler: u32) -> Option<u32> {
        let fits = |llvm: &&u32| **llvm >= compiler && LINKER_FEATURES.contains(llvm);
        let available = self.usable_apt().map(|apt| &apt.llvm);
        self.llvm.iter().find(fits).or_else(|| available?.iter().find(fits)).copied()
    }

    fn tools(&self) -> Option<Step> {
        if self.missing_tools.is_empty() {
            return None;
        }
        self.usable_apt().map(|_| Step::Tools(packages(&self.missing_tools)))
    }

    /// The same machine after the step went well, as far as can be known without taking it.
    pub fn after(&self, step: &Step) -> Self {
        let mut machine = self.clone();
        match step {
            Step::RefreshApt => {
                if let Some(apt) = &mut machine.apt {
                    apt.updated = true;
                    if apt.llvm.is_empty() {
                        // Empty lists say nothing about what full ones will hold.
                        apt.compiler = true;
                        apt.llvm.insert(LLVM);
                    }
                }
            }
            Step::RustupNightly | Step::DebianCompiler => machine.compilers.push(LLVM),
            Step::LlvmDev(llvm) => {
                machine.llvm.insert(*llvm);
            }
            Step::BpfLinker(_) => machine.builds_ebpf = true,
            Step::Tools(_) => machine.missing_tools.clear(),
        }
        machine
    }

    fn by_hand(&self) -> Vec<String> {
        let mut wanted = Vec::new();
        if !self.builds_ebpf {
            if self.compilers.is_empty() {
                wanted.push(format!(
                    "a Rust compiler for BPF: `rustup toolchain install {NIGHTLY} --profile minimal -c rust-src`, or on \
                     Debian the packages {}",
                    DEBIAN_COMPILER.join(" ")
                ));
            }
            let llvm = self.compilers.first().copied().unwrap_or(LLVM);
            wanted.push(format!(
                "LLVM {llvm} with its development files (llvm-{llvm}-dev; https://apt.llvm.org has it for older \
                 Debian and Ubuntu), and bpf-linker built with it: `LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install \
                 bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{llvm} --locked`"
            ));
        }
        if !self.missing_tools.is_empty() {
            wanted.push(format!(
                "the programs {} (Debian's packages {})",
                self.missing_tools.join(", "),
                packages(&self.missing_tools).join(" ")
            ));
        }
        wanted
    }

    /// Every step, if all go well, and what is left to a person then.
    pub fn whole_plan(&self) -> (Vec<Step>, Vec<String>) {
        let (mut machine, mut steps) = (self.clone(), Vec::new());
        loop {
            match machine.next() {
                Next::Ready => return (steps, Vec::new()),
                Next::ByHand(wanted) => return (steps, wanted),
                Next::Take(step) => {
                    machine = machine.after(&step);
                    steps.push(step);
                }
            }
        }
    }
}

/// The packages of these tools, each once.
fn packages(tools: &[&str]) -> Vec<&'static str> {
    let wanted = TOOLS.iter().filter(|(tool, _)| tools.contains(tool)).map(|(_, package)| *package);
    wanted.collect::<BTreeSet<_>>().into_iter().collect()
}

/// A command line, to be shown and then run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    pub environment: Vec<(&'static str, String)>,
    pub words: Vec<String>,
}

impl std::fmt::Display for CommandLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, value) in &self.environment {
            write!(f, "{name}={value} ")?;
        }
        let quoted = |word: &String| if word.contains(' ') { format!("'{word}'") } else { word.clone() };
        f.write_str(&self.words.iter().map(quoted).collect::<Vec<_>>().join(" "))
    }
}

impl Step {
    pub fn command(&self, privilege: Privilege) -> CommandLine {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let apt = |arguments: &str, packages: &[&str]| {
            // sudo drops the environment, so a variable has to come after it.
            let before = match privilege {
                Privilege::Sudo => "sudo env DEBIAN_FRONTEND=noninteractive",
                Privilege::Root | Privilege::None => "env DEBIAN_FRONTEND=noninteractive",
            };
            let mut words = words(&format!("{before} apt-get {arguments}"));
            words.extend(packages.iter().map(|package| (*package).to_owned()));
            CommandLine { environment: Vec::new(), words }
        };
        // rustc-web conflicts with Debian's own rustc and rustup: never trade somebody's compiler for ours.
        let install = "install -y --no-install-recommends --no-remove";
        match self {
            Self::RefreshApt => apt("update -q", &[]),
            Self::RustupNightly => CommandLine {
                // One retry: where nothing can be downloaded, Debian's packages are waiting.
                environment: vec![("RUSTUP_MAX_RETRIES", "1".into()), ("RUST_BACKTRACE", "0".into())],
                words: words(&format!(
                    "rustup toolchain install {NIGHTLY} --profile minimal -c rust-src --no-self-update"
                )),
            },
            Self::DebianCompiler => apt(install, &DEBIAN_COMPILER),
            Self::LlvmDev(llvm) => apt(install, &[&format!("llvm-{llvm}-dev")]),
            Self::BpfLinker(llvm) => CommandLine {
                // Without the prefix bpf-linker's build finds no libLLVM on Debian ("unable to find library -lLLVM").
                environment: vec![("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))],
                // --force replaces one that was built with another LLVM.
                words: words(&format!(
                    "cargo install bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{llvm} \
                     --locked --force"
                )),
            },
            Self::Tools(packages) if packages.contains(&"coturn") => {
                let mut command = apt(install, packages);
                command.words.extend(["-o".to_owned(), NO_STUN_SERVICE.to_owned()]);
                command
            }
            Self::Tools(packages) => apt(install, packages),
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
