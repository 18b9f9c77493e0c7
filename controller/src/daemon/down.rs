//! The way out: stop the daemon, take the datapath away, undo what was changed on the host. Works from whatever a
//! killed daemon left behind, and any number of times.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use super::Places;
use super::state::{FILE, LOCK, StateDir, holder, try_lock};
use crate::api::{Request, client};
use crate::cli::table::Table;
use crate::datapath;
use crate::hosts::{Host, Journal, UndoReport};
use crate::observe::history;

/// For the daemon to end after it was told to, and after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was undone.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DownReport {
    /// Process id of the daemon that was stopped.
    pub stopped: Option<i32>,
    /// Programs, tables and arrays that were removed from the kernel.
    pub removed: Vec<String>,
    /// Changes of the host that were undone.
    pub restored: Vec<String>,
    /// Changes of the host that were gone already.
    pub gone: Vec<String>,
    /// Left as they are because somebody else changed them since.
    pub left: Vec<Left>,
    /// Could not be undone; another `down` tries again.
    pub failed: Vec<Left>,
    /// Files that were removed.
    pub files: Vec<String>,
    /// Files that were kept, and why.
    pub kept: Vec<Left>,
}

/// Something that was not undone, and why.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Left {
    pub what: String,
    pub why: String,
}

impl DownReport {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["WHAT", "DONE", "NOTE"]);
        let mut row = |what: &str, done: &str, note: &str| table.row([what, done, note].map(str::to_owned));
        if let Some(pid) = self.stopped {
            row(&format!("daemon (process {pid})"), "stopped", "");
        }
        self.removed.iter().for_each(|what| row(what, "removed", ""));
        self.restored.iter().for_each(|what| row(what, "restored", ""));
        self.gone.iter().for_each(|what| row(what, "gone already", ""));
        self.left.iter().for_each(|left| row(&left.what, "left alone", &left.why));
        self.failed.iter().for_each(|left| row(&left.what, "NOT UNDONE", &left.why));
        self.files.iter().for_each(|what| row(what, "removed", ""));
        self.kept.iter().for_each(|left| row(&left.what, "kept", &left.why));
        if self.is_empty() {
            return format!(
                "nothing was there\n{}",
                if self.kept.is_empty() { String::new() } else { table.render("") }
            );
        }
        table.render("nothing was there")
    }

    fn is_empty(&self) -> bool {
        *self == Self { kept: self.kept.clone(), ..Self::default() }
    }
}

/// Takes everything away. `forget` also removes what says who owns which ports.
///
/// # Errors
/// If the daemon cannot be stopped or the kernel does not give something back; calling it again goes on from there.
pub fn down(places: &Places, forget: bool) -> anyhow::Result<DownReport> {
    if !nix::unistd::geteuid().is_root() {
        bail!("taking the gateway away needs root: use sudo");
    }
    let mut report = DownReport::default();
    let lock = if places.state_dir.is_dir() {
        report.stopped = stop(places)?;
        // Ours from here on: no daemon starts while its things are taken away.
        Some(StateDir::open(&places.state_dir)?)
    } else {
        None
    };
    report.removed = datapath::down(&places.pin_dir)
        .with_context(|| format!("removing the datapath pinned at {}", places.pin_dir.display()))?;
    if let Some(state) = lock {
        let undone = undo(&places.state_dir)?;
        let pairs =
            |pairs: Vec<(String, String)>| pairs.into_iter().map(|(what, why)| Left { what, why }).collect();
        report.restored = undone.restored;
        report.gone = undone.gone;
        report.left = pairs(undone.left);
        report.failed = pairs(undone.failed);
        let file = places.state_dir.join(FILE);
        if forget {
            remove(&file, &mut report)?;
            for name in history::FILES {
                remove(&places.state_dir.join(name), &mut report)?;
            }
        } else if file.exists() {
            let why = "who owns which ports, for the next start; --forget removes it".to_owned();
            report.kept.push(Left { what: file.display().to_string(), why });
        }
        for file in ["state.json.new", crate::probes::FILE, "health.json.new"] {
            remove(&places.state_dir.join(file), &mut report)?;
        }
        state.remove()?;
    }
    remove(&places.socket, &mut report)?;
    Ok(report)
}

/// Stops the daemon that has the lock: by its socket, by SIGTERM, at last by SIGKILL, which it survives as well as
/// any other end. Its process id, if there was one.
fn stop(places: &Places) -> anyhow::Result<Option<i32>> {
    let path = places.state_dir.join(LOCK);
    if try_lock(&path)?.is_some() {
        return Ok(None);
    }
    let pid = holder(&path);
    let asked = client::ask_within(&places.socket, &Request::Stop, PATIENCE);
    if matches!(asked, Ok(Ok(_))) && ended(&path, PATIENCE)? {
        return Ok(pid.or(Some(0)));
    }
    let Some(pid) = pid else {
        // Just killed, and still giving back what it had.
        if ended(&path, PATIENCE)? {
            return Ok(None);
        }
        bail!("{} is locked, but nobody says by whom: stop the daemon by hand", path.display());
    };
    for (signal, patience) in [(Signal::SIGTERM, PATIENCE), (Signal::SIGKILL, PATIENCE)] {
        log::warn!("the daemon (process {pid}) does not answer at {}: {signal}", places.socket.display());
        match kill(Pid::from_raw(pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => return Err(error).with_context(|| format!("{signal} to process {pid}")),
        }
        if ended(&path, patience)? {
            return Ok(Some(pid));
        }
    }
    bail!("process {pid} does not end");
}

/// Waits until nobody has the lock.
fn ended(lock: &Path, patience: Duration) -> anyhow::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        if try_lock(lock)?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn undo(state_dir: &Path) -> anyhow::Result<UndoReport> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        let mut journal = Journal::open(state_dir)?;
        let host = Host::open()?;
        journal.undo_all(&host).await
    })
}

fn remove(path: &Path, report: &mut DownReport) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => report.files.push(path.display().to_string()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        Err(error) => return Err(error).with_context(|| format!("removing {}", path.display())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_nothing_says_so_and_one_of_something_lists_it() {
        assert_eq!(DownReport::default().text(), "nothing was there\n");
        let report = DownReport { removed: vec!["xdp of device 7".into()], ..DownReport::default() };
        let text = report.text();
        assert!(text.contains("xdp of device 7") && text.contains("removed"), "{text}");
        let kept = Left { what: "state.json".into(), why: "ports".into() };
        let report = DownReport { kept: vec![kept], ..DownReport::default() };
        assert!(report.text().starts_with("nothing was there\n"), "what is kept is not undone");
    }
}
