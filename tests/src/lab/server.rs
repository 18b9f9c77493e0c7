//! Threads that serve until they are dropped, and the recorder that keeps what a reading thread saw.

use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A thread that is told to stop, and waited for, when this is dropped.
///
/// The thread gets the reading end of a pipe: what is written means whatever the two agree on, its end means
/// stop.
#[derive(Debug)]
pub(super) struct Background {
    wake: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts `work`. It must return soon after the pipe ends.
    pub fn spawn(name: &str, work: impl FnOnce(PipeReader) + Send + 'static) -> io::Result<Self> {
        let (stopped, wake) = io::pipe()?;
        let thread = std::thread::Builder::new().name(format!("lab-{name}")).spawn(move || work(stopped))?;
        Ok(Background { wake: Some(wake), thread: Some(thread) })
    }

    /// Writes one byte to the pipe.
    fn nudge(&self) {
        if let Some(mut wake) = self.wake.as_ref() {
            // It fails only when the thread has ended, and then there is nobody to nudge.
            let _ = wake.write_all(&[1]);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.wake = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("a thread of the lab panicked; its message is above");
        }
    }
}

/// Waits until one of the descriptors is ready and returns the events of each; a signal counts as nothing
/// ready.
pub(super) fn wait_ready(wanted: &[(BorrowedFd<'_>, PollFlags)]) -> io::Result<Vec<PollFlags>> {
    wait_ready_until(wanted, None)
}

/// Like [`wait_ready`], but no longer than until `deadline`.
pub(super) fn wait_ready_until(
    wanted: &[(BorrowedFd<'_>, PollFlags)],
    deadline: Option<Instant>,
) -> io::Result<Vec<PollFlags>> {
    let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
        // Rounded up, or the last millisecond would be spent spinning.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    let mut fds: Vec<PollFd<'_>> = wanted.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
    match poll(&mut fds, timeout) {
        Ok(_) => Ok(fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect()),
        Err(nix::Error::EINTR) => Ok(vec![PollFlags::empty(); fds.len()]),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks, whoever panicked while holding it: what is behind these locks is never left half-written.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything a thread has read from a descriptor, in order, for tests to wait on.
pub(super) struct Recorder<T> {
    shared: Arc<Shared<T>>,
    background: Background,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    records: Vec<T>,
    /// Nudges asked for, and answered after reading until there was nothing more.
    asked: u64,
    answered: u64,
    ended: bool,
}

impl<T: Clone + Send + 'static> Recorder<T> {
    /// Starts a thread that calls `read` whenever `source` is readable, until it says there is nothing more.
    pub fn start(
        name: &str,
        source: Arc<OwnedFd>,
        mut read: impl FnMut(&OwnedFd) -> io::Result<Option<T>> + Send + 'static,
    ) -> io::Result<Self> {
        let state = State { records: Vec::new(), asked: 0, answered: 0, ended: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let writer = Arc::clone(&shared);
        let background = Background::spawn(name, move |nudges| {
            let result = writer.read_until_stopped(&source, nudges, &mut read);
            lock(&writer.state).ended = true;
            writer.changed.notify_all();
            if let Err(error) = result {
                panic!("reading what passes: {error}");
            }
        })?;
        Ok(Recorder { shared, background })
    }

    /// What was read so far, after reading what is there now.
    pub fn snapshot(&self) -> Vec<T> {
        self.flush();
        lock(&self.shared.state).records.clone()
    }

    /// Forgets what was read so far.
    pub fn clear(&self) {
        self.flush();
        lock(&self.shared.state).records.clear();
    }

    /// The first record, past or to come, that `wanted` accepts.
    pub fn wait_for(&self, timeout: Duration, mut wanted: impl FnMut(&T) -> bool) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.shared.state);
        let mut seen = 0;
        loop {
            // Something may have cleared the records meanwhile.
            let fresh = state.records.get(seen..).unwrap_or(&state.records);
            if let Some(found) = fresh.iter().find(|record| wanted(record)) {
                return Some(found.clone());
            }
            seen = state.records.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended {
                return None;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the thread has read all there is.
    fn flush(&self) {
        let mut state = lock(&self.shared.state);
        state.asked += 1;
        let ticket = state.asked;
        self.background.nudge();
        while state.answered < ticket && !state.ended {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Shared<T> {
    fn read_until_stopped(
        &self,
        source: &OwnedFd,
        mut nudges: PipeReader,
        read: &mut impl FnMut(&OwnedFd) -> io::Result<Option<T>>,
    ) -> io::Result<()> {
        loop {
            let ready =
                wait_ready(&[(nudges.as_fd(), PollFlags::POLLIN), (source.as_fd(), PollFlags::POLLIN)])?;
            let mut nudged = 0;
            if !ready[0].is_empty() {
                nudged = nudges.read(&mut [0; 64])?;
                if nudged == 0 {
                    return Ok(());
                }
            }
            while let Some(record) = read(source)? {
                lock(&self.state).records.push(record);
                self.changed.notify_all();
            }
            if nudged > 0 {
                lock(&self.state).answered += nudged as u64;
                self.changed.notify_all();
            }
        }
    }
}
