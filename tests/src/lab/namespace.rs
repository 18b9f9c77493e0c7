//! A network namespace that goes when its last handle does.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::sched::{CloneFlags, setns};

use super::craft::Mac;
use super::identity::{LabId, NETNS_DIR, machine_lock, remove_namespace};
use super::process::{Finished, ProcessGuard, run_limited};

/// How long [`Namespace::run`] lets a command take.
const RUN_LIMIT: Duration = Duration::from_secs(60);

/// A network namespace of the lab: loopback up, IPv6 off.
///
/// Clones are handles to the same namespace. With the last one it is deleted: processes inside are killed and
/// the name is taken away; the kernel frees it when the last socket in it is closed.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Makes a namespace `pc-<pid>-<n>-<label>` with a lab number of its own.
    ///
    /// # Errors
    /// Without root, or if `ip netns add` fails.
    pub fn create(label: &str) -> anyhow::Result<Self> {
        Self::create_in(&LabId::fresh(), label)
    }

    /// Makes a namespace as part of a lab: its name is `pc-<pid>-<n>-<label>`.
    pub fn create_in(lab: &LabId, label: &str) -> anyhow::Result<Self> {
        if let Some(reason) = super::why_unavailable() {
            bail!("{reason}");
        }
        let name = lab.namespace_name(label);
        let path = Path::new(NETNS_DIR).join(&name);
        {
            let _serialised = machine_lock()?;
            let added = run_limited(Command::new("ip").args(["netns", "add", &name]), RUN_LIMIT)?;
            ensure!(added.status.success(), "ip netns add {name}: {}", added.stderr.trim());
        }
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()));
        let file = file.inspect_err(|_| remove_namespace(&path))?;
        let namespace = Namespace(Arc::new(Inner { name, path, file }));
        namespace.run(&["ip", "link", "set", "lo", "up"])?;
        for scope in ["all", "default"] {
            let key = format!("net.ipv6.conf.{scope}.disable_ipv6");
            // Absent where the kernel has no IPv6, which is as quiet.
            if namespace.sysctl(&key).is_ok() {
                namespace.set_sysctl(&key, "1")?;
            }
        }
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The file that stands for it, `/run/netns/<name>`.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A command that will run inside: the network namespace is the only thing that differs from outside, so
    /// paths, mounts and the bpffs stay visible. (`ip netns exec` would also give it a mount namespace of its
    /// own; without that, /sys/class/net shows the devices of the machine, and nothing here reads it.)
    ///
    /// # Panics
    /// If `arguments` is empty.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let (program, rest) = arguments.split_first().expect("a command has at least a program");
        let mut command = Command::new(program);
        command.args(rest).env("LC_ALL", "C");
        // Held by the closure, so that it is open in the child whatever happens to the namespace meanwhile.
        let inner = Arc::clone(&self.0);
        // SAFETY: between fork and exec the closure only calls setns, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || setns(&inner.file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from))
        };
        command
    }

    /// Runs a command inside and returns its standard output.
    ///
    /// # Errors
    /// If it cannot be started, fails (the error carries what it wrote to standard error) or takes longer
    /// than 60 s.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let finished = self.output(arguments, RUN_LIMIT)?;
        if !finished.status.success() {
            bail!(
                "`{}` in {} failed ({}): {}{}",
                arguments.join(" "),
                self.name(),
                finished.status,
                finished.stderr.trim(),
                // Some tools complain on standard output.
                if finished.stderr.trim().is_empty() { finished.stdout.trim() } else { "" },
            );
        }
        Ok(finished.stdout)
    }

    /// Runs `ip` inside with the words of `line` as arguments.
    pub fn ip(&self, line: &str) -> anyhow::Result<String> {
        let arguments: Vec<&str> = std::iter::once("ip").chain(line.split_whitespace()).collect();
        self.run(&arguments)
    }

    /// Runs a command inside and returns what became of it, success or not.
    pub(super) fn output(&self, arguments: &[&str], limit: Duration) -> anyhow::Result<Finished> {
        run_limited(&mut self.command(arguments), limit).with_context(|| format!("in {}", self.name()))
    }

    /// Starts a command inside that runs until the guard is dropped; its output is discarded.
    pub fn spawn(&self, arguments: &[&str]) -> anyhow::Result<ProcessGuard> {
        let mut command = self.command(arguments);
        ProcessGuard::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
            .with_context(|| format!("in {}", self.name()))
    }

    /// Runs `work` on a fresh thread that is inside. Sockets opened there stay in the namespace wherever they
    /// go. Only the network namespace is entered; `/proc/thread-self/net` and `/proc/sys/net` follow it,
    /// `/proc/net` and
    /// `/sys/class/net` do not.
    ///
    /// # Panics
    /// With the panic of `work`, or if the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                if let Err(errno) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
                    panic!("entering network namespace {}: {errno}", self.name());
                }
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Index of a device inside.
    pub fn ifindex(&self, device: &str) -> anyhow::Result<u32> {
        self.enter(|| nix::net::if_::if_nametoindex(device))
            .with_context(|| format!("device {device} in {}", self.name()))
    }

    /// Hardware address of a device inside.
    pub fn mac(&self, device: &str) -> anyhow::Result<Mac> {
        self.enter(|| hardware_address(device))
            .with_context(|| format!("hardware address of {device} in {}", self.name()))
    }

    /// First IPv4 address of a device inside.
    pub fn address(&self, device: &str) -> anyhow::Result<Ipv4Addr> {
        let listing = self.ip(&format!("-j -4 address show dev {device}"))?;
        let listing: serde_json::Value = serde_json::from_str(&listing).context("output of ip -j address")?;
        let local = listing.pointer("/0/addr_info/0/local").and_then(|local| local.as_str());
        local
            .with_context(|| format!("{device} in {} has no IPv4 address", self.name()))?
            .parse()
            .with_context(|| format!("address of {device}"))
    }

    /// Value of a sysctl inside, trimmed. `key` is dotted (`net.ipv4.ip_forward`) or, for device names with
    /// dots, a path below /proc/sys (`net/ipv4/conf/eth0.5/forwarding`). Only `net` keys belong to a
    /// namespace.
    pub fn sysctl(&self, key: &str) -> anyhow::Result<String> {
        let path = sysctl_path(key)?;
        let value = self.enter(|| fs::read_to_string(&path));
        let value = value.with_context(|| format!("sysctl {key} in {}", self.name()))?;
        Ok(value.trim().to_owned())
    }

    /// Sets a sysctl inside.
    ///
    /// # Errors
    /// Also for keys outside `net`: those are the machine's, which the lab never touches.
    pub fn set_sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = sysctl_path(key)?;
        self.enter(|| fs::write(&path, value))
            .with_context(|| format!("setting sysctl {key} = {value} in {}", self.name()))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        remove_namespace(&self.path);
    }
}

fn sysctl_path(key: &str) -> anyhow::Result<PathBuf> {
    let relative = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    ensure!(
        relative.starts_with("net/") && !relative.contains(".."),
        "sysctl {key} does not belong to a network namespace"
    );
    Ok(Path::new("/proc/sys").join(relative))
}

/// SIOCGIFHWADDR for a device of the calling thread's namespace.
fn hardware_address(device: &str) -> io::Result<Mac> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: ifreq is plain data; all zeroes is an empty name and an empty address.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the descriptor is open for the whole call, and the kernel reads and writes one ifreq, which is
    // ours.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFHWADDR succeeded, so the kernel filled in this member of the union.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|i| data[i] as u8))
}
