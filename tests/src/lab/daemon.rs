//! The controller under test: started in the gateway's namespace, asked, stopped in every way it may be
//! stopped.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::bpffs::{BpfFs, open_log};
use super::intercept::Intercept;
use super::namespace::Namespace;
use super::process::{Finished, ProcessGuard};
use super::{POLL, eventually};

/// How long a client command, or the end after SIGTERM, may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long `down` may take on the way out, where nobody reads its result any more.
const LAST_DOWN_LIMIT: Duration = Duration::from_secs(10);
/// How much of the log goes into an error, bytes.
const LOG_TAIL: usize = 4000;

/// What the controller is started with.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// The `portcullis` binary.
    pub binary: PathBuf,
    /// The policy, YAML.
    pub policy: PathBuf,
    /// Where it keeps what must survive a reboot; made if it is not there.
    pub state_dir: PathBuf,
    /// Where it pins, on a bpffs.
    pub pin_dir: PathBuf,
    /// Its control socket.
    pub socket: PathBuf,
    /// Where its standard output and error go; appended to.
    pub log: PathBuf,
    /// More arguments of `run`.
    pub arguments: Vec<String>,
    /// More variables in its environment.
    pub environment: Vec<(String, String)>,
    /// Who decides over its bpf(2) calls; nobody unless asked for.
    pub intercept: Option<Intercept>,
}

impl DaemonSpec {
    /// Everything beside `bpffs`, pins in it. They outlive the daemon, and go with the bpffs.
    pub fn beside(bpffs: &BpfFs, binary: &Path, policy: &Path) -> Self {
        let scratch = bpffs.scratch().path();
        DaemonSpec {
            binary: binary.to_owned(),
            policy: policy.to_owned(),
            state_dir: scratch.join("state"),
            pin_dir: bpffs.path().join("portcullis"),
            socket: scratch.join("control.sock"),
            log: scratch.join("daemon.log"),
            arguments: Vec::new(),
            environment: Vec::new(),
            intercept: None,
        }
    }
}

/// A controller in a gateway's namespace. Dropped, it is killed and `portcullis down` is run, so that the
/// datapath it left goes too; that is a best effort, the namespace's end is what makes sure.
///
/// It enters the network namespace only, so it sees the bpffs and the files of the test; /sys/class/net shows
/// it the machine's devices, on which it must not rely.
#[derive(Debug)]
pub struct Daemon {
    spec: DaemonSpec,
    namespace: Namespace,
    process: Option<ProcessGuard>,
    is_down: bool,
}

impl Daemon {
    /// Starts `portcullis run --policy FILE --state-dir DIR --pin-dir DIR --socket PATH` inside `namespace`.
    pub fn spawn(namespace: &Namespace, spec: &DaemonSpec) -> anyhow::Result<Self> {
        let mut daemon =
            Daemon { spec: spec.clone(), namespace: namespace.clone(), process: None, is_down: true };
        daemon.start()?;
        Ok(daemon)
    }

    /// Starts it again after it was terminated or killed, with the same specification or what
    /// [`Daemon::spec_mut`] made of it.
    ///
    /// # Errors
    /// Also if it still runs.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.is_running() {
            bail!("the daemon runs already");
        }
        std::fs::create_dir_all(&self.spec.state_dir)
            .with_context(|| format!("making {}", self.spec.state_dir.display()))?;
        let log = open_log(&self.spec.log)?;
        let mut command = self.namespace.command(&[text(&self.spec.binary)?, "run"]);
        command.arg("--policy").arg(&self.spec.policy).args(self.places()?).args(&self.spec.arguments);
        command.envs(self.spec.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if let Some(intercept) = &self.spec.intercept {
            intercept.watch(&mut command)?;
        }
        self.process = Some(ProcessGuard::spawn(&mut command)?);
        self.is_down = false;
        Ok(())
    }

    /// Waits until its socket accepts.
    ///
    /// # Errors
    /// If it ended or did not get ready in time; the end of its log is in the message.
    pub fn wait_ready(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            if UnixStream::connect(&self.spec.socket).is_ok() {
                return Ok(());
            }
            if !self.is_running() {
                bail!("the daemon ended before it was ready\n{}", self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!("the daemon was not ready within {timeout:?}\n{}", self.log_tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(ProcessGuard::is_running)
    }

    /// Its process id, while there is a process.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(ProcessGuard::pid)
    }

    /// What it is started with.
    pub fn spec(&self) -> &DaemonSpec {
        &self.spec
    }

    /// What it will be started with next time.
    pub fn spec_mut(&mut self) -> &mut DaemonSpec {
        &mut self.spec
    }

    /// Runs the client, `portcullis --socket PATH ARGUMENTS...`, and reads its standard output as JSON.
    ///
    /// # Errors
    /// If it fails (the message carries the exit code and standard error) or prints something else.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let answer = self.ask_text(arguments)?;
        serde_json::from_str(&answer).with_context(|| format!("`{}` printed {answer:?}", arguments.join(" ")))
    }

    /// Like [`Daemon::ask`], for whatever it prints.
    pub fn ask_text(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let (status, stdout, stderr) = self.client(arguments)?;
        if !status.success() {
            bail!("`portcullis {}` failed ({status}): {}", arguments.join(" "), stderr.trim());
        }
        Ok(stdout)
    }

    /// Runs the client and returns what became of it, success or not: exit status, standard output, standard
    /// error.
    pub fn client(&self, arguments: &[&str]) -> anyhow::Result<(ExitStatus, String, String)> {
        let mut all = vec!["--socket", text(&self.spec.socket)?];
        all.extend(arguments);
        let Finished { status, stdout, stderr } = self.run_binary(&all, ANSWER_LIMIT)?;
        Ok((status, stdout, stderr))
    }

    /// SIGTERM, and waits for its end: the datapath stays.
    ///
    /// # Errors
    /// If it was not running, or still runs after 30 s.
    pub fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        let process = self.process.as_mut().context("the daemon does not run")?;
        process.signal(Signal::SIGTERM).context("SIGTERM")?;
        let status = process.wait(ANSWER_LIMIT);
        let status = status.with_context(|| self.log_tail())?;
        self.process = None;
        Ok(status)
    }

    /// SIGKILL, and waits for its end: the datapath stays.
    pub fn kill(&mut self) {
        // Its guard kills and reaps.
        self.process = None;
    }

    /// Runs `portcullis down --state-dir DIR --pin-dir DIR --socket PATH` inside the namespace and returns
    /// what it printed: the datapath goes, and with it a daemon that still runs (`down` tells it, or it is
    /// killed here).
    ///
    /// # Errors
    /// If `down` fails.
    pub fn down(&mut self) -> anyhow::Result<String> {
        let finished = self.run_down(ANSWER_LIMIT)?;
        if !finished.status.success() {
            bail!("`portcullis down` failed ({}): {}", finished.status, finished.stderr.trim());
        }
        self.is_down = true;
        eventually(Duration::from_secs(2), || !self.is_running());
        self.kill();
        Ok(finished.stdout)
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        std::fs::read(&self.spec.log)
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let start = log.ceil_char_boundary(log.len().saturating_sub(LOG_TAIL));
        format!("--- {}\n{}", self.spec.log.display(), &log[start..])
    }

    fn run_down(&self, limit: Duration) -> anyhow::Result<Finished> {
        let places = self.places()?;
        let mut all = vec!["down"];
        all.extend(places.iter().map(String::as_str));
        self.run_binary(&all, limit)
    }

    fn run_binary(&self, arguments: &[&str], limit: Duration) -> anyhow::Result<Finished> {
        let mut all = vec![text(&self.spec.binary)?];
        all.extend(arguments);
        self.namespace.output(&all, limit)
    }

    /// The options that `run` and `down` share.
    fn places(&self) -> anyhow::Result<[String; 6]> {
        let DaemonSpec { state_dir, pin_dir, socket, .. } = &self.spec;
        Ok([
            "--state-dir".to_owned(),
            text(state_dir)?.to_owned(),
            "--pin-dir".to_owned(),
            text(pin_dir)?.to_owned(),
            "--socket".to_owned(),
            text(socket)?.to_owned(),
        ])
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        self.kill();
        if !self.is_down {
            let _ = self.run_down(LAST_DOWN_LIMIT);
        }
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
