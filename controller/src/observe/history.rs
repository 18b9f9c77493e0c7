//! The allocation history: who had which public port, address or listener, and when. It outlives the daemon, so that an
//! abuse report about last night can be answered (`whois --at`).
//!
//! Two files of JSON lines in the state directory, [`CURRENT`] and the one before it. A line is a change; the first lines of
//! a file say everything that was so when it was begun, so that either file can be read without the other. A line that a
//! crash tore is skipped and told.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::holdings::{Holdings, Line};
use super::time::parse;

/// The file that is written to.
pub const CURRENT: &str = "history.jsonl";
/// The one before it.
pub const BEFORE: &str = "history.1.jsonl";
const BEGUN: &str = "history.jsonl.new";
/// All there may be.
pub const FILES: [&str; 3] = [CURRENT, BEFORE, BEGUN];

/// Bytes of a file; a larger one is put aside. One that begins with more than half of this may grow to twice its beginning.
const LARGEST: u64 = 4 << 20;
/// Bytes of a line that are read; ours are below 64 KiB.
const LONGEST_LINE: u64 = 1 << 20;

/// What was read of a history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    pub holdings: Holdings,
    /// Time of the first line; `None`: there is no history.
    pub begins: Option<u64>,
    /// Lines that could not be read.
    pub torn: usize,
}

/// Reads what was so at a moment (`None`: now) from the files in this directory.
///
/// # Errors
/// If a file that is there cannot be read.
pub fn replay(directory: &Path, at: Option<u64>) -> io::Result<Replayed> {
    let mut known = Replayed::default();
    for name in [BEFORE, CURRENT] {
        let file = match File::open(directory.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if !read(file, at, &mut known)? {
            break;
        }
    }
    Ok(known)
}

/// Reads one file; `false` once a line is later than `at`.
fn read(file: impl io::Read, at: Option<u64>, known: &mut Replayed) -> io::Result<bool> {
    let mut reader = BufReader::new(file);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes)? == 0 {
            return Ok(true);
        }
        if bytes == b"\n" {
            continue;
        }
        let line = serde_json::from_slice::<Line>(&bytes).ok();
        let Some((line, time)) = line.and_then(|line| parse(&line.time, 0).map(|time| (line, time))) else {
            known.torn += 1;
            continue;
        };
        known.begins.get_or_insert(time);
        if at.is_some_and(|at| time > at) {
            return Ok(false);
        }
        known.holdings.apply(&line, time);
    }
}

/// The history under the daemon's hand.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    /// What the files say.
    held: Holdings,
    largest: u64,
}

impl History {
    /// Reads what the last daemon has written. One that cannot be read is begun anew, and said so.
    pub fn open(directory: &Path) -> Self {
        let held = match replay(directory, None) {
            Ok(known) => {
                if known.torn > 0 {
                    log::warn!("{} lines of the allocation history cannot be read", known.torn);
                }
                known.holdings
            }
            Err(error) => {
                log::warn!("the allocation history in {}: {error}", directory.display());
                Holdings::default()
            }
        };
        Self { directory: directory.to_owned(), held, largest: LARGEST }
    }

    /// Writes what has changed; how many lines. On an error the next call tries again.
    pub fn note(&mut self, next: Holdings, time: u64) -> io::Result<usize> {
        let next = next.with_times_of(&self.held);
        let path = self.directory.join(CURRENT);
        let size = match fs::metadata(&path) {
            Ok(found) => Some(found.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let changes = self.held.changes(&next, time);
        if size.is_some() && changes.is_empty() {
            return Ok(0);
        }
        let text = text(&changes)?;
        match size {
            Some(size) if size + text.len() as u64 <= self.largest => self.append(&path, &text)?,
            _ => self.begin(&path, &next, time)?,
        }
        self.held = next;
        Ok(changes.len())
    }

    fn append(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).mode(0o600).open(path)?;
        // Behind a line that a crash tore.
        let whole = ends_in_newline(path)?;
        let mut bytes = if whole { Vec::new() } else { b"\n".to_vec() };
        bytes.extend(text);
        file.write_all(&bytes)?;
        file.sync_data()
    }

    /// Puts the file aside and begins another. At no moment is there neither.
    fn begin(&mut self, path: &Path, next: &Holdings, time: u64) -> io::Result<()> {
        let text = text(&next.beginning(time))?;
        let begun = self.directory.join(BEGUN);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&begun)?;
        file.write_all(&text)?;
        file.sync_all()?;
        match fs::rename(path, self.directory.join(BEFORE)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => fs::rename(&begun, path)?,
        }
        self.largest = LARGEST.max(2 * text.len() as u64);
        File::open(&self.directory)?.sync_all()
    }
}

fn text(lines: &[Line]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    Ok(text)
}

fn ends_in_newline(path: &Path) -> io::Result<bool> {
    use std::io::Seek as _;
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut last = [b'\n'];
    if size > 0 {
        file.seek(io::SeekFrom::Start(size - 1))?;
        file.read_exact(&mut last)?;
    }
    Ok(last == *b"\n")
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
