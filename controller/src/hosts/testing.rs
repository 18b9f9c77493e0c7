//! Network namespaces for the tests of this room: made by name, removed by name, also when a test panics.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

/// Says (on stderr) that a test is skipped unless it runs as root.
pub fn needs_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: makes network namespaces, so it must run as root");
    }
    root
}

/// `ip -n <namespace> …`; panics with its message when it fails.
pub fn ip_in(namespace: &str, arguments: &[&str]) {
    let output = Command::new("ip").args(["-n", namespace]).args(arguments).output().expect("ip (iproute2)");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip -n {namespace} {arguments:?}: {error}");
}

/// One namespace, with its loopback up, for as long as this value lives.
pub struct Lab {
    name: String,
}

impl Lab {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pchost-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let output = Command::new("ip").args(["netns", "add", &name]).output().expect("ip (iproute2)");
        assert!(output.status.success(), "ip netns add: {}", String::from_utf8_lossy(&output.stderr));
        let lab = Self { name };
        lab.ip(&["link", "set", "lo", "up"]);
        lab
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn ip(&self, arguments: &[&str]) {
        ip_in(&self.name, arguments);
    }

    /// Runs `work` in the namespace, on a thread of its own with its own runtime: a thread that entered another
    /// namespace must not go back to a pool.
    pub fn run<T: Send + 'static, F: Future<Output = T>>(
        &self,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> T {
        let path = format!("/run/netns/{}", self.name);
        let thread = std::thread::spawn(move || {
            let namespace = std::fs::File::open(&path).expect("the namespace just made");
            setns(&namespace, CloneFlags::CLONE_NEWNET).expect("setns");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(work())
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// A directory removed with this value.
pub struct Scratch(pub std::path::PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pchost-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a scratch directory");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
