//! Asking the daemon.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{Failure, Reply, Request};

/// How long an answer may take: an `apply` of the largest policy is some seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of an answer: every flow of a full table is less.
const MAX_REPLY: u64 = 1 << 31;

/// Asks one question. The outer error: nobody answers, or not as expected.
pub fn ask(socket: &Path, request: &Request) -> anyhow::Result<Result<Value, Failure>> {
    ask_within(socket, request, PATIENCE)
}

/// The same with less patience.
pub fn ask_within(
    socket: &Path,
    request: &Request,
    patience: Duration,
) -> anyhow::Result<Result<Value, Failure>> {
    let stream = UnixStream::connect(socket).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                "no daemon runs there: start one with `portcullis run --policy FILE`, or name its socket with --socket"
            }
            ErrorKind::PermissionDenied => "only root may ask the daemon: use sudo",
            _ => "is this the daemon's socket?",
        };
        anyhow::Error::new(error).context(format!("{}: {advice}", socket.display()))
    })?;
    stream.set_read_timeout(Some(patience)).and_then(|()| stream.set_write_timeout(Some(patience)))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    // A daemon that refuses us (not root, too busy) answers without reading: what it says is still worth reading.
    let sent = (&stream).write_all(&line);
    let mut answer = Vec::new();
    let read = BufReader::new(&stream).take(MAX_REPLY).read_until(b'\n', &mut answer);
    if answer.is_empty() {
        sent.with_context(|| format!("asking the daemon at {}", socket.display()))?;
        read.with_context(|| format!("the daemon at {} did not answer", socket.display()))?;
        bail!("the daemon at {} closed the connection without an answer; see its log", socket.display());
    }
    let reply: Reply = serde_json::from_slice(&answer)
        .with_context(|| format!("{} answers something else than portcullis does", socket.display()))?;
    match reply {
        Reply { ok: true, answer: Some(answer), .. } => Ok(Ok(answer)),
        Reply { error: Some(failure), .. } => Ok(Err(failure)),
        _ => bail!("the daemon at {} answered neither yes nor no", socket.display()),
    }
}
